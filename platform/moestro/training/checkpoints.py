"""A run's resumable checkpoints, and what of a run is in them besides the weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel

from moestro.errors import TrainingError
from moestro.training import parallel
from moestro.training.auxiliary import Auxiliary
from moestro.training.divergence import DivergenceGuard, check_weights
from moestro.training.held_out import Stopper
from moestro.training.history import History
from moestro.training.state import load_state, newest_checkpoint, save_state


@dataclass
class Progress:
    """How far a run has come."""

    done: int = 0
    """Finished optimiser steps."""
    history: History = field(default_factory=History)
    seconds: float = 0.0
    """Time spent in steps, of all attempts."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints in `folder` of the run whose parts these are."""

    folder: Path
    owner: str
    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    auxiliary: Auxiliary | None
    stopper: Stopper | None

    def resume(self) -> Progress:
        """Restore all parts from the newest checkpoint; without one nothing is done yet. Every worker has to call it.

        Raises `InputError` for another run's checkpoint, `ResourceError` if workers find different ones.
        """
        extra: dict[str, Any] = {}
        with parallel.first_worker_first():
            done = load_state(
                self.folder,
                model=self.model,
                optimizer=self.optimizer,
                schedule=self.schedule,
                owner=self.owner,
                extra=extra,
            )
        if parallel.agreed(done, "The last checkpoint's step") is None or done is None:
            return Progress()
        if self.auxiliary:
            self.auxiliary.restore(extra["auxiliary"])
        if self.stopper:
            self.stopper.restore(extra["stopper"])
        return Progress(done, History(**extra["history"]), extra["seconds"])

    @contextmanager
    def named(self, guard: DivergenceGuard) -> Iterator[None]:
        """Let a `TrainingError` of the block say which checkpoint is the last that `guard` knows to be good."""
        try:
            yield
        except TrainingError as error:
            path = newest_checkpoint(self.folder, guard.good)
            words = f"The last good checkpoint is {path}." if path else "There is no good checkpoint from before."
            raise TrainingError(f"{error.message} {words}", hint=error.hint) from None

    def save(self, progress: Progress, guard: DivergenceGuard) -> None:
        """Write a checkpoint; worker 0 does, for all. The newest that `guard` knows to be good stays.

        Raises `TrainingError` for a weight that is not finite.
        """
        check_weights(progress.done, self.model)
        if parallel.rank() > 0:
            return
        save_state(
            self.folder,
            progress.done,
            model=self.model,
            optimizer=self.optimizer,
            schedule=self.schedule,
            owner=self.owner,
            extra={
                "history": asdict(progress.history),
                "seconds": progress.seconds,
                "auxiliary": self.auxiliary.state() if self.auxiliary else {},
                "stopper": self.stopper.state() if self.stopper else {},
            },
            good=guard.good,
        )
