"""The errors a user can meet: what went wrong, where, and what to do about it.

Library code raises these and lets everything else propagate. The command line turns a `MoestroError` into one
readable line and exit code 2, the gateway turns it into a 4xx response; neither ever shows a traceback for one.

`named` gives such an error for one that a library raises without a class of its own; `noting` keeps what goes wrong
while an error is being dealt with from taking its place; `told` is what of an error is written down.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_LONGEST = 500


class MoestroError(Exception):
    """Base of all errors that are a user's to mend. `hint` says how, in one sentence."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".rstrip()

    def __reduce__(self) -> tuple[object, ...]:
        """Keep `hint` when the error crosses a process border (Ray, Prefect)."""
        return _rebuild, (type(self), self.message, self.hint)


def _rebuild(kind: type[MoestroError], message: str, hint: str) -> MoestroError:
    return kind(message, hint=hint)


class ConfigError(MoestroError):
    """A config file or value is wrong: unknown field, wrong type, fields that contradict each other."""


class InputError(MoestroError):
    """What a stage was given cannot be used: a missing corpus, a truncated checkpoint, shapes that differ."""


class ArtifactError(MoestroError):
    """An artifact in the store is missing, corrupted, or not of the kind that was asked for."""


class BusyError(MoestroError):
    """Something exclusive is in use: another run on the same home, a port."""


class ConflictError(MoestroError):
    """What is asked for does not fit how things stand: a rollback where there is no version to go back to."""


class StaleAttemptError(MoestroError):
    """An attempt at an artifact went on after a newer one had taken its place; it changes nothing any more."""


class ResourceError(MoestroError):
    """The machine lacks something: disk space, memory, a package, a worker."""


class LostWorkerError(ResourceError):
    """A worker died, or its machine did; whoever started it may start another."""


class GateError(MoestroError):
    """A deployment gate refused; the message carries the figures."""


class TrainingError(MoestroError):
    """Training cannot go on: a loss or reward that is not finite. Names step and batch."""


class StoppedError(MoestroError):
    """A step was stopped because the run was cancelled or another step failed. It resumes with the next run."""

    def __init__(self, message: str = "Stopped.", *, hint: str = "Run the same command again: it resumes.") -> None:
        super().__init__(message, hint=hint)


@contextmanager
def named(kind: Callable[[Exception], MoestroError]) -> Iterator[None]:
    """Raise `kind(error)` for an error of class `Exception` itself, which tells its reader nothing; let others pass."""
    try:
        yield
    except BaseException as error:
        if type(error) is Exception:
            raise kind(error) from error
        raise


@contextmanager
def noting(first: BaseException) -> Iterator[None]:
    """Clean up after `first`: an error in the block becomes a note of it, so that it is `first` that is heard of.

    Interrupts pass.
    """
    try:
        yield
    except BaseException as second:
        if not isinstance(second, Exception):
            raise
        first.add_note(f"While this was dealt with: {type(second).__name__}: {second}")


def told(error: BaseException) -> str:
    """The error in words without a terminal's colours. One that is not a user's to mend is named by its class, and of
    its message, in which libraries may put whole tracebacks, the first line is kept."""
    words = plain(str(error)).strip()
    if isinstance(error, MoestroError):
        return words
    first = words.partition("\n")[0][:_LONGEST]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def plain(text: str) -> str:
    """The text without a terminal's colours."""
    return _ANSI.sub("", text)
