"""Identity: a hash of *what* is computed, never of where, how fast or by whom."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from moestro.config.base import Config

CHUNK = 16 << 20
"""Bytes read at a time: enough that other threads, which must be waited for after each, cost little."""


def canonical_json(value: Any) -> str:
    """`value` as JSON with sorted keys and no white space; of a config, what is identity.

    Raises `TypeError` for anything without a stable identity: functions, objects, paths, sets, NaN.
    """
    return json.dumps(_stable(value, "value"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _stable(value: Any, where: str) -> Any:
    if isinstance(value, Config):
        return _stable(value.identity(), where)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"{where} is {value}, which has no stable identity")
        return value
    if isinstance(value, list | tuple):
        return [_stable(item, f"{where}[{position}]") for position, item in enumerate(value)]
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"{where} has keys that are not strings")
        return {key: _stable(item, f"{where}.{key}") for key, item in value.items()}
    raise TypeError(f"{where} is a {type(value).__name__}, which has no stable identity")


def fingerprint(stage: str, version: str, config: Any, inputs: Mapping[str, str]) -> str:
    """Identity of a stage's result: its name and semantic version, its config, its inputs' fingerprints (hex, 64)."""
    payload = {"stage": stage, "version": version, "config": config, "inputs": dict(inputs)}
    return hashlib.sha256(canonical_json(payload).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """BLAKE3 of a file's bytes (hex, 64), with as many threads as there are cores."""
    digest = blake3(max_threads=blake3.AUTO)
    buffer = memoryview(bytearray(min(CHUNK, path.stat().st_size)))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def content_fingerprint(files: Mapping[str, Path]) -> str:
    """Identity of files from outside: their names and contents, not where they lie."""
    return fingerprint("files", "2", {name: file_digest(path) for name, path in files.items()}, {})
