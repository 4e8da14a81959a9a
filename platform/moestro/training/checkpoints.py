"""A run's resumable checkpoints, and what of a run is in them besides the weights."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel

from moestro.training import parallel
from moestro.training.auxiliary import Auxiliary
from moestro.training.held_out import Stopper
from moestro.training.history import History
from moestro.training.state import load_state, save_state


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

    def save(self, progress: Progress) -> None:
        """Write a checkpoint; worker 0 does, for all."""
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
        )
