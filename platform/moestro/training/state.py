"""Resumable training checkpoints: files that are there completely or not at all.

    FOLDER/step-00000050-<first digits of its BLAKE3>.pt

A file is written under another name, made durable and renamed. Its digest is part of its name, so one that was
damaged afterwards is passed over and the one before it is used. It names the run that it belongs to, its owner: another
run does not resume from it.
"""

import hashlib
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from moestro.artifacts import disk_space_errors, file_digest, sync
from moestro.errors import InputError

KEPT = 2
DIGITS = 16
SAMPLED = 64
"""Values of each tensor that a model is told apart by."""
_NAME = re.compile(rf"step-(\d+)-([0-9a-f]{{{DIGITS}}})\.pt")
_TEMPORARY = ".tmp"


def save_state(
    folder: Path,
    step: int,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: LRScheduler,
    owner: str,
    extra: dict[str, Any],
    good: Callable[[int], bool] = lambda _: False,
) -> None:
    """Keep everything that `step` finished steps have changed, and drop all but the last two checkpoints and the newest
    whose step is `good`.

    That is: the parameters that require gradients and stored buffers, such as a router's correction bias (the others
    still are what they were loaded as), optimiser, schedule, random states of PyTorch, NumPy and Python, and `extra`
    (JSON values and tensors). `owner` says whose it is. The folder above `folder` has to be there: an attempt that has
    lost it writes nothing. Raises `ResourceError` on a full disk; the checkpoints before are left as they are.
    """
    folder.mkdir(exist_ok=True)
    state = {
        "owner": owner,
        "parameters": trained_tensors(model),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "random": random_state(),
        "extra": extra,
    }
    temporary = folder / f"step-{step:08d}{_TEMPORARY}"
    try:
        with disk_space_errors(folder):
            torch.save(state, temporary)
            publish(temporary, folder / f"step-{step:08d}-{file_digest(temporary)[:DIGITS]}.pt")
    finally:
        temporary.unlink(missing_ok=True)
    there = _checkpoints(folder)
    spared = newest_checkpoint(folder, good)
    for old in there[KEPT:]:
        if old != spared:
            old.unlink()


def load_state(
    folder: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: LRScheduler,
    owner: str,
    extra: dict[str, Any] | None = None,
) -> int | None:
    """Restore the newest intact checkpoint in `folder` and return its step, or None if there is none.

    `extra` is updated with what was saved. Damaged checkpoints and what an interrupted save left are removed. Raises
    `InputError` for one that does not belong to `owner`.
    """
    for leftover in folder.glob(f"step-*{_TEMPORARY}"):
        leftover.unlink()
    for path in _checkpoints(folder):
        step, digest = _parts(path)
        if file_digest(path)[:DIGITS] != digest:
            path.unlink()
            continue
        state = torch.load(path, weights_only=True)
        require_owner(state["owner"], owner, folder)
        trained = trained_tensors(model)
        for name, value in state["parameters"].items():
            trained[name].copy_(value)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        set_random_state(state["random"])
        if extra is not None:
            extra.update(state["extra"])
        return step
    return None


def newest_checkpoint(folder: Path, good: Callable[[int], bool]) -> Path | None:
    """The newest checkpoint in `folder` whose step is `good`."""
    return next((path for path in _checkpoints(folder) if good(_parts(path)[0])), None)


def require_owner(found: str, owner: str, folder: Path) -> None:
    """Raise `InputError` if what was found in `folder` is another run's."""
    if found != owner:
        raise InputError(
            f"The training checkpoint in {folder} belongs to a run with another config, model or data.",
            hint="Give this run a scratch folder of its own, or delete that one to start anew.",
        )


def model_fingerprint(model: nn.Module) -> str:
    """Tells models apart: a digest (hex) of what trains and what does not, of shapes, and of values of each tensor."""
    digest = hashlib.sha256()
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tuple(value.shape)} {value.dtype} {value.requires_grad}".encode())
        values = value.detach().flatten()
        digest.update(values[:: max(1, len(values) // SAMPLED)].double().numpy().tobytes())
    return digest.hexdigest()


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters that require gradients, and persistent buffers; detached, by name."""
    stored = model.state_dict().keys()
    parameters = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    return parameters | {name: value for name, value in model.named_buffers() if name in stored}


@contextmanager
def nothing_trained(model: nn.Module) -> Iterator[None]:
    """No gradient stays from the block; buffers and random states are afterwards what they were."""
    state = random_state()
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    yield
    set_random_state(state)
    for name, value in model.named_buffers():
        value.copy_(buffers[name])
    model.zero_grad(set_to_none=True)


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


def _parts(path: Path) -> tuple[int, str]:
    """A checkpoint's step, and the first digits of its digest."""
    matched = _NAME.fullmatch(path.name)
    assert matched
    return int(matched[1]), matched[2]


def random_state() -> dict[str, Any]:
    """Of PyTorch, NumPy and Python."""
    state: Any = np.random.get_state(legacy=True)  # noqa: NPY002  (others may draw from it)
    kind, keys, *rest = state
    return {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": [kind, keys.tolist(), *rest]}


def set_random_state(state: dict[str, Any]) -> None:
    """Go back to what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), *rest))  # noqa: NPY002  (see above)
