"""What interrupted stages left to resume from: how much it is, and taking it away. Artifacts are never touched."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moestro.artifacts.attempt import folder_of, folders, idle
from moestro.errors import BusyError


@dataclass(frozen=True)
class Scratch:
    """What is left of a stage that has not finished: it is being made now, was interrupted, or was given up."""

    base: Path
    """The work folder's path, but for the attempt's number."""
    size: int
    """Bytes of the files in it."""

    @property
    def name(self) -> str:
        """Stage and beginning of the fingerprint: `tune/0123456789abcdef`."""
        return f"{self.base.parent.name}/{self.base.name}"


def unfinished(root: Path) -> Iterator[Scratch]:
    """The work folders of the store at `root`, by name. What vanishes meanwhile is not counted."""
    for base in folders(root / "work"):
        if folder := folder_of(base):
            yield Scratch(base, sum(_size(path) for path in folder.rglob("*")))


def discard(root: Path) -> tuple[list[Scratch], list[Scratch]]:
    """Remove every work folder that no process works in; returns those removed, and those in use."""
    removed, busy = [], []
    for scratch in unfinished(root):
        try:
            with idle(scratch.base, what=scratch.name) as folder:
                if folder:
                    shutil.rmtree(folder)
        except BusyError:
            busy.append(scratch)
        else:
            removed.append(scratch)
    return removed, busy


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size if path.is_file() and not path.is_symlink() else 0
    except FileNotFoundError:
        return 0
