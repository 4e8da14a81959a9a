"""Which problems each update works on: a pure function of the config, so that a resumed run meets the same ones."""

import hashlib
from dataclasses import dataclass
from typing import Any

from moestro.config import RlConfig
from moestro.data.tasks import Problem, Task
from moestro.data.tokenizer import answer_stop_ids, encode
from moestro.errors import InputError


def derived_seed(seed: int, step: int, purpose: str) -> int:
    """A 31-bit seed for one purpose at one step, unrelated to those of other steps and purposes."""
    return int.from_bytes(hashlib.sha256(f"{purpose} {seed} {step}".encode()).digest()[:4], "big") >> 1


@dataclass(frozen=True)
class Curriculum:
    """The problems of every update and their prompts as token ids."""

    problems: list[list[Problem]]
    prompts: list[list[list[int]]]
    stop_token_ids: list[int]
    """End of text, and every token with a line break in it: an answer is one line."""

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(prompt) for prompts in self.prompts for prompt in prompts)


def build_curriculum(config: RlConfig, task: Task, tokenizer: Any, *, max_positions: int) -> Curriculum:
    """Problems of all updates. Raises `InputError` if a prompt leaves no room for `config.max_tokens`."""
    problems = [
        task.problems(config.prompts_per_step, split="train", seed=derived_seed(config.seed, step, "problems"))
        for step in range(config.steps)
    ]
    prompts = [encode(tokenizer, [problem.prompt for problem in some]) for some in problems]
    curriculum = Curriculum(problems, prompts, answer_stop_ids(tokenizer))
    if curriculum.longest_prompt + config.max_tokens > max_positions:
        raise InputError(
            f"A prompt of {curriculum.longest_prompt} tokens and rl.max_tokens {config.max_tokens} do not fit into the "
            f"model's {max_positions} positions.",
            hint="Lower rl.max_tokens or choose an easier task.",
        )
    return curriculum
