"""Rollouts of a model by vLLM in this process, as the trainer's batch."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from moestro.artifacts import Artifact
from moestro.config import TaskConfig
from moestro.data.tasks import Task
from moestro.data.tokenizer import encode, load_tokenizer
from moestro.inference.engine import Completion, EngineConfig, Sampling, VllmEngine
from moestro.rl.rollouts import Rollouts, collate

PROMPTS, COMPLETIONS, TOKENS = 32, 4, 48
HELD_OUT_PROMPTS, LENGTH = 96, 48
"""Of the domains' held-out text; tokens of each."""


@dataclass(frozen=True)
class Sampled:
    """Rollouts, and what they are made of."""

    prompts: list[list[int]]
    groups: list[list[Completion]]

    @property
    def batch(self) -> Rollouts:
        """For the trainer; advantages are drawn at random, for no reward is asked."""
        generator = torch.Generator().manual_seed(0)
        shape = (len(self.groups), len(self.groups[0]))
        return collate(self.prompts, self.groups, torch.randn(shape, generator=generator))

    @property
    def complete(self) -> float:
        """Share of samples whose routing has a row for every token but the last sampled one."""
        rows = [
            answer.routes is not None and len(answer.routes) == len(prompt) + len(answer.token_ids) - 1
            for prompt, group in zip(self.prompts, self.groups, strict=True)
            for answer in group
        ]
        return sum(rows) / len(rows)


def task_prompts(folder: Path, task: TaskConfig, count: int) -> list[list[int]]:
    """Prompts of `count` problems as the checkpoint in `folder` reads them."""
    problems = Task.open(task).problems(count, split="train", seed=0)
    return encode(load_tokenizer(folder), [problem.prompt for problem in problems])


def held_out_prompts(tokens: Sequence[Artifact], count: int) -> list[list[int]]:
    """`count` stretches of held-out text, as many from each of `tokens` as from the others, evenly spread."""
    each, found = count // len(tokens), list[list[int]]()
    for one in tokens:
        text_T = np.load(one.path / "held_out.npy", mmap_mode="r")
        found += [text_T[start : start + LENGTH].tolist() for start in range(0, len(text_T), len(text_T) // each)][
            :each
        ]
    return found


def sample(
    folder: Path,
    prompts: list[list[int]],
    *,
    dtype: Literal["float32", "bfloat16"],
    seed: int,
    completions: int = COMPLETIONS,
    tokens: int = TOKENS,
) -> Sampled:
    """`completions` of each prompt, all `tokens` long, with their routing, at temperature 1."""
    length = max(map(len, prompts)) + tokens + 1
    with closing(VllmEngine(folder, EngineConfig(dtype=dtype, max_model_len=length, routes=True))) as engine:
        sampling = Sampling(n=completions, max_tokens=tokens, temperature=1.0, seed=seed, stop_token_ids=[])
        return Sampled(prompts, engine.generate(prompts, sampling))
