"""Resumable training checkpoints: files that are there completely or not at all.

    FOLDER/step-00000050-<first digits of its BLAKE3>.pt

A file is written under another name, made durable and renamed. Its digest is part of its name, so one that was
damaged afterwards is passed over and the one before it is used.
"""

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from moestro.artifacts import file_digest, sync

KEPT = 2
DIGITS = 16
_NAME = re.compile(rf"step-(\d+)-([0-9a-f]{{{DIGITS}}})\.pt")
_TEMPORARY = ".tmp"


def save_state(
    folder: Path,
    step: int,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: LRScheduler,
    extra: dict[str, Any],
) -> None:
    """Keep everything that `step` finished steps have changed, and drop all but the last two checkpoints.

    That is: the parameters that require gradients (the others still are what they were loaded as), optimiser,
    schedule, the random states of PyTorch, NumPy and Python, and `extra` (JSON values and tensors).
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        "parameters": {name: value.detach() for name, value in model.named_parameters() if value.requires_grad},
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "random": _random_state(),
        "extra": extra,
    }
    temporary = folder / f"step-{step:08d}{_TEMPORARY}"
    torch.save(state, temporary)
    publish(temporary, folder / f"step-{step:08d}-{file_digest(temporary)[:DIGITS]}.pt")
    for old in _checkpoints(folder)[KEPT:]:
        old.unlink()


def load_state(
    folder: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: LRScheduler,
    extra: dict[str, Any] | None = None,
) -> int | None:
    """Restore the newest intact checkpoint in `folder` and return its step, or None if there is none.

    `extra` is updated with what was saved. Damaged checkpoints and what an interrupted save left are removed.
    """
    for leftover in folder.glob(f"step-*{_TEMPORARY}"):
        leftover.unlink()
    for path in _checkpoints(folder):
        matched = _NAME.fullmatch(path.name)
        assert matched
        if file_digest(path)[:DIGITS] != matched[2]:
            path.unlink()
            continue
        state = torch.load(path, weights_only=True)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in state["parameters"].items():
                parameters[name].copy_(value)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        _set_random_state(state["random"])
        if extra is not None:
            extra.update(state["extra"])
        return int(matched[1])
    return None


def publish(temporary: Path, target: Path) -> None:
    """Move a finished file or folder to `target` in one atomic step that also survives a loss of power."""
    files = [path for path in temporary.rglob("*") if path.is_file()] if temporary.is_dir() else [temporary]
    for path in files:
        sync(path)
    temporary.rename(target)
    sync(target.parent)


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted((path for path in folder.glob("step-*.pt") if _NAME.fullmatch(path.name)), reverse=True)


def _random_state() -> dict[str, Any]:
    state: Any = np.random.get_state(legacy=True)  # noqa: NPY002  (others may draw from it)
    kind, keys, *rest = state
    return {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": [kind, keys.tolist(), *rest]}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), *rest))  # noqa: NPY002  (see above)
