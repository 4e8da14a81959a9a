"""Attempts at an artifact: each claims the work with a number of its own, and only the newest can change anything.

    <base>.<n>.lock   attempt n's claim, kept until the next one's, so that numbers grow even after publishing
    <base>.<n>/       its folder

Creating the claim is atomic, and taking over moves the folder to the new attempt's name: every path that an older
attempt knows is gone from then on, whatever it was about to do (docs/adr/0010). The claim is locked while its process
lives; who finds it locked needs word that the process is lost.
"""

import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moestro.artifacts.durable import sync
from moestro.artifacts.lock import describe
from moestro.errors import BusyError, StaleAttemptError


@dataclass(frozen=True)
class Claimant:
    """Who makes an attempt, as its cluster knows it. By default nobody is ever taken for lost."""

    labels: Mapping[str, str] = field(default_factory=dict)
    """Written into the claim, for later claimants to judge."""
    lost: Callable[[Mapping[str, str]], bool] = lambda _: False
    """Whether the process whose claim has these labels is known to be lost, though its lock is still held."""


@dataclass(frozen=True)
class Attempt:
    """One attempt at the artifact made at `base`."""

    base: Path
    number: int

    @property
    def folder(self) -> Path:
        """Where it works."""
        return _named(self.base, self.number)

    def check(self, what: str) -> None:
        """Raise `StaleAttemptError` if a newer attempt has taken over."""
        if (newest := _newest_claim(self.base)) != self.number:
            holder = describe(_read(_claim_of(self.base, newest)))
            raise StaleAttemptError(
                f"Attempt {self.number} at {what} was thought lost, and attempt {newest} by {holder} has taken over.",
                hint="It has changed nothing since. Run the same command again: what the other publishes is reused.",
            )


@contextmanager
def attempt(base: Path, *, what: str, claimant: Claimant | None = None) -> Iterator[Attempt]:
    """Claim the work at `base`, and take over what the attempt before left in its folder.

    Raises `BusyError`, naming the holder, if another process works on it that `claimant` does not know to be lost.
    Whatever goes wrong in the block of an attempt that is no longer the newest becomes a `StaleAttemptError`.
    """
    base.parent.mkdir(parents=True, exist_ok=True)
    number, handle = _claim(base, what, claimant or Claimant())
    try:
        own = Attempt(base, number)
        _take_over(own)
        try:
            yield own
        except Exception:
            _leave_if_stale(own, what)
            raise
    finally:
        os.close(handle)


@contextmanager
def idle(base: Path, *, what: str) -> Iterator[Path | None]:
    """The folder that attempts have left, if any; none begins in the block. Writes nothing: the disk may be full.

    Raises `BusyError` if a process works in it.
    """
    with _refused_if_held(base, _newest_claim(base), what, Claimant()):
        yield folder_of(base)


def folders(root: Path) -> Iterator[Path]:
    """The bases below `root` that have a folder of some attempt, by name."""
    yield from sorted({path.with_suffix("") for path in root.glob("*/*") if path.is_dir()})


def folder_of(base: Path) -> Path | None:
    """The folder of the newest attempt that has one."""
    numbers = _folder_numbers(base)
    return _named(base, numbers[-1]) if numbers else None


def _claim(base: Path, what: str, claimant: Claimant) -> tuple[int, int]:
    """The number of a new claim and the handle that locks it. Of claims made at once, the newest stands."""
    while True:
        newest = _newest_claim(base)
        with _refused_if_held(base, newest, what, claimant):
            pass
        number = max([newest, *_folder_numbers(base)]) + 1
        try:
            handle = os.open(_claim_of(base, number), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            continue
        try:
            _lock(handle, claimant)
            if (later := _newest_claim(base)) != number:
                raise _busy(what, _read(_claim_of(base, later)))
        except BaseException:
            os.close(handle)
            raise
        return number, handle


def _lock(handle: int, claimant: Claimant) -> None:
    fcntl.flock(handle, fcntl.LOCK_EX)
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "labels": dict(claimant.labels)}
    os.pwrite(handle, json.dumps(holder).encode(), 0)
    os.fsync(handle)


@contextmanager
def _refused_if_held(base: Path, number: int, what: str, claimant: Claimant) -> Iterator[None]:
    """Hold the lock of claim `number` in the block, if it is there and free or its holder is lost."""
    try:
        handle = os.open(_claim_of(base, number), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:  # there is none, or a newer one has been made meanwhile
        yield
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read(_claim_of(base, number))
            if not claimant.lost(holder.get("labels", {})):
                raise _busy(what, holder) from None
        yield
    finally:
        os.close(handle)


def _take_over(own: Attempt) -> None:
    """Move the folder of the attempt before to this one's name, or make it; older claims are dropped."""
    base = own.base
    while earlier := [number for number in _folder_numbers(base) if number < own.number]:
        source = _named(base, earlier[-1])
        if own.folder.exists():  # then this is what an older attempt made after it had lost its folder
            shutil.rmtree(source, ignore_errors=True)
            continue
        try:
            source.rename(own.folder)
        except FileNotFoundError:  # a claim that came before this one has moved it
            continue
    own.folder.mkdir(exist_ok=True)
    for number in _numbers(base, r"\.lock"):
        if number < own.number:
            _claim_of(base, number).unlink(missing_ok=True)
    sync(base.parent)


def _leave_if_stale(own: Attempt, what: str) -> None:
    try:
        own.check(what)
    except StaleAttemptError:
        shutil.rmtree(own.folder, ignore_errors=True)  # what it wrote after it had lost its folder
        raise


def _busy(what: str, holder: Mapping[str, Any]) -> BusyError:
    return BusyError(f"{what} is in use by {describe(holder)}.", hint="Wait for it to finish, or stop it.")


def _read(claim: Path) -> dict[str, Any]:
    """Who holds it; nothing is known of a claim that is just being made or dropped."""
    try:
        content = claim.read_bytes()
    except FileNotFoundError:
        return {}
    return dict(json.loads(content)) if content else {}


def _named(base: Path, number: int) -> Path:
    return base.with_name(f"{base.name}.{number}")


def _claim_of(base: Path, number: int) -> Path:
    return base.with_name(f"{base.name}.{number}.lock")


def _newest_claim(base: Path) -> int:
    """Its number; 0 if there is none."""
    return max(_numbers(base, r"\.lock"), default=0)


def _folder_numbers(base: Path) -> list[int]:
    """Of the attempts that have a folder, rising."""
    return sorted(_numbers(base, ""))


def _numbers(base: Path, suffix: str) -> list[int]:
    pattern = re.compile(rf"{re.escape(base.name)}\.(\d+){suffix}")
    return [int(match[1]) for path in base.parent.iterdir() if (match := pattern.fullmatch(path.name))]
