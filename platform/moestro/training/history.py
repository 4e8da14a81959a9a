"""What a training run writes down: `history.json` (deterministic figures only) and its summary."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

HISTORY = "history.json"
FLATNESS_SHARE = 5
"""Flatness compares the last fifth of the steps with the fifth before it."""


@dataclass
class History:
    """The course of a run: the loss of every step, and a row of figures for every logged one."""

    losses: list[float] = field(default_factory=list)
    """Mean cross entropy of each step's batch, nats per token."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """One row per logged step. `loss` is the mean since the row before it."""

    def log(self, step: int, figures: dict[str, float]) -> dict[str, float]:
        """Add a row for `step` (finished steps) and return its figures."""
        since = self.rows[-1]["step"] if self.rows else 0
        figures = {"loss": fmean(self.losses[since:step]), **figures}
        self.rows.append({"step": step, **figures})
        return figures

    def write(self, folder: Path) -> None:
        """Write `folder`/history.json."""
        (folder / HISTORY).write_text(json.dumps({"steps": self.rows}, indent=1) + "\n")

    def flatness(self) -> float:
        """Relative improvement of the mean loss from the last but one fifth of the steps to the last.

        Near 0: the run has converged as far as its schedule lets it. 0 for runs of fewer than five steps.
        """
        part = len(self.losses) // FLATNESS_SHARE
        if not part:
            return 0.0
        before, last = fmean(self.losses[-2 * part : -part]), fmean(self.losses[-part:])
        return (before - last) / before


@dataclass(frozen=True)
class TrainingResult:
    """Key figures of a training run. Times are of all attempts, resumed ones included."""

    final_loss: float
    """Mean training loss since the last but one logged step, nats per token."""
    steps: int
    """Optimiser steps that were done."""
    tokens: int
    """Tokens trained on."""
    tokens_per_second: float
    """Tokens by seconds."""
    seconds: float
    """Time spent in steps."""
    loss_flatness: float
    """Relative improvement of the mean loss over the last fifth of the steps."""
    flops: float
    """Model FLOPs of all steps (see `flops`)."""
    mfu: float
    """Model FLOPs utilisation: model FLOPs per second by what this machine's matrix products reach."""
    epochs: dict[str, float]
    """How often each domain's text was gone through."""

    last: dict[str, Any]
    """The last row of the history."""

    stopped_at: int | None = None
    """Step at which the held-out loss had not fallen for long enough; None: it ran to its end."""
    best_step: int | None = None
    """Step whose weights were kept, where training can stop early."""
    best_held_out_loss: float | None = None
    """Their held-out loss, nats per token."""

    def figures(self, *names: str) -> dict[str, Any]:
        """As JSON values, without what is None; of the last row only what is named."""
        figures = {name: value for name, value in asdict(self).items() if value is not None}
        last = figures.pop("last")
        return figures | {name: last[name] for name in names}
