"""Rollouts on disk: tokens, log-probabilities, routes and rewards of a step, with what they came from.

    FOLDER/step-00000001-<first digits of its BLAKE3>.npz

A file is compressed, written under another name, made durable and renamed; its digest is part of its name, so that one
damaged afterwards is seen. What an update does follows from such a file and the training state before it.

Shapes: N prompts, G completions per prompt, F reward functions, A sampled tokens and R routing rows of all
completions, L layers, K chosen experts.
"""

import json
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moestro.artifacts import disk_space_errors, file_digest, sync
from moestro.errors import InputError
from moestro.inference.engine import Completion
from moestro.rl.rewards import Verdicts

DIGITS = 16
_NAME = re.compile(rf"step-(\d{{8}})-([0-9a-f]{{{DIGITS}}})\.npz")


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What a batch of rollouts came from."""

    step: int
    """The step (from 1) that learns from it."""
    policy_version: int
    """Updates that the policy which sampled it had had."""
    model: str
    """Identity of the model that the stage began with."""
    dtype: str
    """Type the engine computed in."""
    temperature: float
    max_tokens: int
    seed: int
    """Of the engine's sampling."""


@dataclass(frozen=True)
class RolloutRecord:
    """Everything that an update needs of the engine and the rewards."""

    prompts: list[list[int]]
    groups: list[list[Completion]]
    verdicts: Verdicts
    provenance: Provenance


def write_record(folder: Path, record: RolloutRecord) -> Path:
    """Keep `record` in `folder`; returns the file. Raises `ResourceError` on a full disk, and leaves nothing then."""
    folder.mkdir(exist_ok=True)
    stem = f"step-{record.provenance.step:08d}"
    temporary = folder / f"{stem}.tmp"
    try:
        with disk_space_errors(folder):
            with temporary.open("wb") as file:
                np.savez_compressed(file, allow_pickle=False, **_arrays(record))
            sync(temporary)
            target = folder / f"{stem}-{file_digest(temporary)[:DIGITS]}.npz"
            temporary.rename(target)
            sync(folder)
    finally:
        temporary.unlink(missing_ok=True)
    return target


class Writer:
    """Writes records to a folder, one after the other, beside whoever goes on with them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._begun: dict[int, tuple[RolloutRecord, Future[None]]] = {}

    def begin(self, record: RolloutRecord, after: Callable[[], None] | None = None) -> None:
        """Have `record` written, and `after` called once it is on disk."""

        def write() -> None:
            write_record(self.folder, record)
            if after is not None:
                after()

        self._begun[record.provenance.step] = record, self._pool.submit(write)

    def begun(self, step: int) -> RolloutRecord | None:
        """The record of `step` (from 1) if it may not be on disk yet."""
        record, _ = self._begun.get(step, (None, None))
        return record

    def settle(self) -> None:
        """Wait until all are on disk; raises what `write_record` raised."""
        while self._begun:
            step = next(iter(self._begun))
            self._begun[step][1].result()
            del self._begun[step]

    def close(self) -> None:
        """Write what was begun, and end. No record can be begun after this."""
        self._pool.shutdown()


def find_record(folder: Path, step: int) -> Path | None:
    """The file of `step` (from 1) in `folder`, None if there is none."""
    found = sorted(folder.glob(f"step-{step:08d}-*.npz")) if folder.is_dir() else []
    return found[0] if found else None


def read_record(path: Path) -> RolloutRecord:
    """The record in `path`; raises `InputError` if it is none, or its contents are not those that were written."""
    match = _NAME.fullmatch(path.name)
    if match is None or not path.is_file():
        raise InputError(f"{path} is no record of rollouts.")
    if file_digest(path)[:DIGITS] != match[2]:
        raise InputError(
            f"{path} is damaged: its contents are not those that its name stands for.", hint="Delete it to sample anew."
        )
    with np.load(path, allow_pickle=False) as stored:
        arrays = dict(stored)
    header = json.loads(str(arrays["header"]))
    prompts = _cut(arrays["prompt_ids"], arrays["prompt_lengths"])
    answers = _cut(arrays["token_ids"], arrays["lengths"])
    logprobs = np.split(arrays["logprobs"], np.cumsum(arrays["lengths"])[:-1])
    completions = [
        Completion(ids, part, routes, reason)
        for ids, part, routes, reason in zip(
            answers, logprobs, _routes(arrays, prompts, answers, header["group"]), header["finish_reasons"], strict=True
        )
    ]
    group = header["group"]
    groups = [completions[start : start + group] for start in range(0, len(completions), group)]
    verdicts = Verdicts(
        torch.from_numpy(arrays["rewards"]), torch.from_numpy(arrays["total_rewards"]), header["failures"]
    )
    return RolloutRecord(prompts, groups, verdicts, Provenance(**header["provenance"]))


def _arrays(record: RolloutRecord) -> dict[str, np.ndarray]:
    completions = [answer for group in record.groups for answer in group]
    header = {
        "provenance": asdict(record.provenance),
        "group": len(record.groups[0]),
        "finish_reasons": [answer.finish_reason for answer in completions],
        "failures": record.verdicts.failures,
    }
    routes = [answer.routes for answer in completions if answer.routes is not None]
    arrays = {
        "header": np.array(json.dumps(header)),
        "prompt_ids": _joined(record.prompts),
        "prompt_lengths": _lengths(record.prompts),
        "token_ids": _joined([answer.token_ids for answer in completions]),
        "lengths": _lengths([answer.token_ids for answer in completions]),
        "logprobs": np.concatenate([answer.logprobs for answer in completions]),
        "rewards": record.verdicts.by_function_FNG.numpy(),
        "total_rewards": record.verdicts.total_NG.numpy(),
    }
    return arrays | ({"routes": np.concatenate(routes)} if routes else {})


def _joined(sequences: list[list[int]]) -> np.ndarray:
    return np.array([token for sequence in sequences for token in sequence], np.int32)


def _lengths(sequences: list[list[int]]) -> np.ndarray:
    return np.array([len(sequence) for sequence in sequences], np.int32)


def _cut(ids: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    parts: list[list[int]] = [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]
    return parts


def _routes(
    arrays: dict[str, Any], prompts: list[list[int]], answers: list[list[int]], group: int
) -> list[np.ndarray | None]:
    if "routes" not in arrays:
        return [None] * len(answers)
    rows = [len(prompts[number // group]) + len(answer) - 1 for number, answer in enumerate(answers)]
    return list(np.split(arrays["routes"], np.cumsum(rows)[:-1]))
