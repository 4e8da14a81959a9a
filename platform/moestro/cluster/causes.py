"""What a Ray task raised, as it raised it there."""

from typing import Any

from moestro.errors import MoestroError, plain


def cause_of(error: Any) -> BaseException:
    """The error behind a `RayTaskError`, whose own message is the worker's whole traceback in colours.

    Where it is not a user's to mend, that traceback becomes a note of it.
    """
    import ray

    cause: BaseException = error.cause
    while isinstance(cause, ray.exceptions.RayTaskError):  # a task that waited for a task
        cause = cause.cause
    if not isinstance(cause, MoestroError):
        cause.add_note(f"On its worker:\n{plain(str(error))}".rstrip())
    return cause
