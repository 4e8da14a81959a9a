"""Exclusive use of a folder across processes. The kernel drops a lock with its process, also after kill -9."""

import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moestro.errors import BusyError


@contextmanager
def exclusive(path: Path, *, what: str, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path` while in the block.

    Raises `BusyError`, naming the holder, if another process has it and `wait` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise BusyError(
                f"{what} is in use by {describe(_holder(handle))}.", hint="Wait for it to finish, or stop it."
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        yield
    finally:
        os.close(handle)


def describe(holder: Mapping[str, Any]) -> str:
    """Whom a lock file names, in words."""
    return f"process {holder['pid']} on {holder['host']}" if holder else "another process"


def _holder(handle: int) -> dict[str, Any]:
    content = os.pread(handle, 1024, 0)
    return dict(json.loads(content)) if content else {}
