"""The errors a user can meet: what went wrong, where, and what to do about it.

Library code raises these and lets everything else propagate. The command line turns a `MoestroError` into one
readable line and exit code 2, the gateway turns it into a 4xx response; neither ever shows a traceback for one.
"""


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


class ResourceError(MoestroError):
    """The machine lacks something: disk space, memory, a package, a worker."""


class GateError(MoestroError):
    """A deployment gate refused; the message carries the figures."""


class TrainingError(MoestroError):
    """Training cannot go on: a loss or reward that is not finite. Names step and batch."""


class StoppedError(MoestroError):
    """A step was stopped because the run was cancelled or another step failed. It resumes with the next run."""

    def __init__(self, message: str = "Stopped.", *, hint: str = "Run the same command again: it resumes.") -> None:
        super().__init__(message, hint=hint)
