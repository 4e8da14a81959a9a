"""Accuracy on held-out problems before and after training, greedy and sampled, on the same problems."""

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import torch

from moestro.config import TaskConfig
from moestro.data.tasks import Task
from moestro.data.tokenizer import load_tokenizer
from moestro.evaluation.answers import greedy_answers, sampled_accuracy
from moestro.models.checkpoint import load_model

Z = 1.96


@dataclass(frozen=True)
class Answered:
    """What a checkpoint got right, by problem."""

    greedy: list[float]
    """1 where the likeliest answer is right, else 0."""
    sampled: list[float]
    """Share of right ones among answers sampled at temperature 1."""


@dataclass(frozen=True)
class Gain:
    """How much more is right after than before, problem by problem."""

    before: float
    """Mean over problems."""
    after: float
    """Mean over problems."""
    half_width: float
    """Half the 95% interval of the mean difference over problems (normal approximation, paired)."""

    @classmethod
    def of(cls, before: list[float], after: list[float]) -> "Gain":
        """Of the same problems, in the same order."""
        differences = [new - old for old, new in zip(before, after, strict=True)]
        return cls(fmean(before), fmean(after), Z * stdev(differences) / math.sqrt(len(differences)))

    @property
    def difference(self) -> float:
        """After less before."""
        return self.after - self.before

    def __str__(self) -> str:
        """Both, and the difference with its interval."""
        return f"{self.before:.3f} to {self.after:.3f}: {self.difference:+.3f} ± {self.half_width:.3f}"


def answered(folder: Path, task: TaskConfig, problems: int, max_tokens: int, *, samples: int) -> Answered:
    """The checkpoint in `folder` on problems of the task that were never trained on."""
    opened = Task.open(task)
    model, tokenizer = load_model(folder, dtype=torch.float32).eval(), load_tokenizer(folder)
    asked = opened.problems(problems, split="held_out", seed=0)
    greedy = greedy_answers(model, tokenizer, opened, asked, max_tokens)
    sampled = sampled_accuracy(model, tokenizer, opened, asked, max_tokens, samples=samples, seed=0)
    return Answered([float(answer.correct) for answer in greedy], sampled)
