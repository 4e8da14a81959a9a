"""Greedy accuracy on held-out problems, with its interval."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from moestro.config import TaskConfig
from moestro.data.tasks import Task
from moestro.data.tokenizer import load_tokenizer
from moestro.evaluation.answers import greedy_answers
from moestro.models.checkpoint import load_model

Z = 1.96


@dataclass(frozen=True)
class Share:
    """A share of right answers."""

    right: int
    asked: int

    @property
    def share(self) -> float:
        """In [0, 1]."""
        return self.right / self.asked

    def joint_half_width(self, other: "Share") -> float:
        """Half the 95% interval of the difference of two shares (normal approximation)."""
        return Z * math.sqrt(sum(one.share * (1 - one.share) / one.asked for one in (self, other)))

    def __str__(self) -> str:
        """The share with half its 95% interval."""
        return f"{self.share:.3f} ± {Z * math.sqrt(self.share * (1 - self.share) / self.asked):.3f}"


def accuracy(folder: Path, task: TaskConfig, problems: int, max_tokens: int) -> Share:
    """Of the checkpoint in `folder`, on problems of the task that were never trained on."""
    opened = Task.open(task)
    model, tokenizer = load_model(folder, dtype=torch.float32).eval(), load_tokenizer(folder)
    answers = greedy_answers(model, tokenizer, opened, opened.problems(problems, split="held_out", seed=0), max_tokens)
    return Share(sum(answer.correct for answer in answers), len(answers))
