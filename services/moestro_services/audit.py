"""`Audit`: who changed what, one JSON line each, for ever.

A line is on the disk before `write` returns, and is never changed. Several processes may write; each line is one write
under a lock. What looks like an API key, or is named like a secret, is not written.
"""

import json
import math
import os
import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moestro.artifacts import disk_space_errors, exclusive, sync
from moestro.errors import ConfigError
from moestro_flows.home import Home

UNREADABLE = "unreadable"
"""The action of an entry that stands for a damaged line; its target names the line."""
REMOVED = "[removed]"
_KEY = re.compile(r"mk-[A-Za-z0-9_-]{20,}")
_SECRET_NAME = re.compile(r"secret|passw|authorization|credential|api_?key|^token$|(access|auth|bearer)_?token", re.I)


@dataclass(frozen=True)
class AuditEntry:
    """One change."""

    at: datetime
    """When; of a damaged line, the time of the line before it."""
    actor: str
    """The id of the caller's key, or what else made the change."""
    action: str
    target: str
    details: Mapping[str, Any] = field(default_factory=dict)


class Audit:
    """The audit log in the file `path`, which need not be there yet."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, home: Home) -> "Audit":
        """The audit log of a home."""
        return cls(home.path / "audit.jsonl")

    def write(self, actor: str, action: str, target: str, **details: Any) -> None:
        """Add a line; `details` are JSON values, others become text. Waits for the disk.

        Raises `ConfigError` if the file cannot be written, `ResourceError` if the disk is full.
        """
        now = datetime.now(UTC).isoformat()
        entry = {"at": now, "actor": actor, "action": action, "target": target, "details": details}
        text = json.dumps(_clean(entry), ensure_ascii=False, allow_nan=False, default=lambda value: _clean(str(value)))
        line = text.encode("utf-8", "replace") + b"\n"
        try:
            with disk_space_errors(self.path), exclusive(self._lock, what="The audit log", wait=True):
                _append(self.path, line)
        except (PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError) as error:
            raise ConfigError(f"{self.path} cannot be written ({error.strerror}).") from None

    def read(self, limit: int = 100) -> list[AuditEntry]:
        """The newest `limit` entries, newest first. A damaged line is an entry too, which tells its number."""
        try:
            with self.path.open("rb") as file:
                kept = deque(enumerate(file, 1), maxlen=max(0, limit))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be read ({error.strerror}).") from None
        entries: list[AuditEntry] = []
        for number, line in kept:
            before = entries[-1].at if entries else datetime.fromtimestamp(0, UTC)
            entries.append(_parsed(line) or AuditEntry(before, "", UNREADABLE, f"line {number} of {self.path.name}"))
        return entries[::-1]

    @property
    def _lock(self) -> Path:
        return self.path.with_suffix(".lock")


def _append(path: Path, line: bytes) -> None:
    """One write at the end; a line that a loss of power cut off keeps to itself."""
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        size = os.fstat(handle).st_size
        torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
        whole = b"\n" + line if torn else line
        while whole:
            whole = whole[os.write(handle, whole) :]
        os.fsync(handle)
        if size == 0:
            sync(path.parent)
    finally:
        os.close(handle)


def _parsed(line: bytes) -> AuditEntry | None:
    """The entry in a line, None if it is none."""
    try:
        content = json.loads(line)
        at = datetime.fromisoformat(content["at"])
        actor, action, target, details = (content[name] for name in ("actor", "action", "target", "details"))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    words = all(isinstance(word, str) for word in (actor, action, target))
    sound = words and isinstance(details, dict) and at.tzinfo is not None
    return AuditEntry(at, actor, action, target, details) if sound else None


def _clean(value: Any) -> Any:
    """The value without what looks like a secret; figures that JSON does not know become words."""
    if isinstance(value, Mapping):
        return {
            _clean(str(name)): REMOVED if _SECRET_NAME.search(str(name)) else _clean(item)
            for name, item in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [_clean(item) for item in value]
    if isinstance(value, str):
        return _KEY.sub(REMOVED, value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
