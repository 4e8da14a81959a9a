"""Which problems each update works on: a pure function of the config, so that a resumed run meets the same ones."""

import hashlib
from dataclasses import dataclass
from typing import Any

from moestro.config import FunctionReward, RlConfig
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


def build_curriculum(
    config: RlConfig, task: Task, tokenizer: Any, *, max_positions: int, vocab_size: int
) -> Curriculum:
    """Problems of all updates.

    Raises `InputError` if a prompt leaves no room for `config.max_tokens`, an answer is longer than that, or the
    tokenizer does not write the task's text, or writes it with ids that the model does not have.
    """
    problems = [
        task.problems(config.prompts_per_step, split="train", seed=derived_seed(config.seed, step, "problems"))
        for step in range(config.steps)
    ]
    prompts = [encode(tokenizer, [problem.prompt for problem in some]) for some in problems]
    flat = [problem for some in problems for problem in some]
    answers = encode(tokenizer, [f" {problem.answer}" for problem in flat])
    _check_tokenizer(config, tokenizer, flat[0], [ids for some in prompts for ids in some] + answers, vocab_size)
    curriculum = Curriculum(problems, prompts, answer_stop_ids(tokenizer))
    if curriculum.longest_prompt + config.max_tokens > max_positions:
        raise InputError(
            f"A prompt of {curriculum.longest_prompt} tokens and rl.max_tokens {config.max_tokens} do not fit into the "
            f"model's {max_positions} positions.",
            hint="Lower rl.max_tokens or choose an easier task.",
        )
    _check_answers(config, flat, answers)
    return curriculum


def _check_tokenizer(
    config: RlConfig, tokenizer: Any, example: Problem, sequences: list[list[int]], vocab_size: int
) -> None:
    largest = max(max(ids, default=0) for ids in sequences)
    if largest >= vocab_size:
        raise InputError(
            f"The checkpoint's tokenizer writes task {config.task.name!r} with token {largest}, its model has only "
            f"{vocab_size}.",
            hint="The tokenizer is another model's: put the model's own beside its weights.",
        )
    written = tokenizer.decode(encode(tokenizer, [example.prompt])[0], skip_special_tokens=True)
    if written.strip() != example.prompt.strip():
        raise InputError(
            f"The checkpoint's tokenizer cannot write the text of task {config.task.name!r}: {example.prompt[:60]!r} "
            f"becomes {written[:60]!r}.",
            hint="Choose a task in characters that the tokenizer knows, or a model that knows the task's.",
        )


def _check_answers(config: RlConfig, problems: list[Problem], answers: list[list[int]]) -> None:
    if all(isinstance(reward, FunctionReward) for reward in config.rewards):
        return  # what they reward need not be the answer
    longer = [number for number, answer in enumerate(answers) if len(answer) > config.max_tokens]
    if longer:
        worst = max(longer, key=lambda number: len(answers[number]))
        raise InputError(
            f"{len(longer)} of {len(problems)} answers of task {config.task.name!r} are longer than rl.max_tokens "
            f"{config.max_tokens}: {problems[worst].answer!r} has {len(answers[worst])} tokens.",
            hint="Raise rl.max_tokens, or choose arguments with shorter answers.",
        )
