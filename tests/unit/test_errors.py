"""What is written down of an error, and what a Ray task raised."""

from typing import Any

import pytest

from moestro.cluster.causes import cause_of
from moestro.errors import InputError, MoestroError, told

TRACEBACK = "\x1b[36mray::branch()\x1b[39m (pid=1, ip=1.2.3.4)\n" + '  File "x.py", line 1\n' * 100


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (InputError("There are no tokens.", hint="Add some."), "There are no tokens. Add some."),
        (InputError("vLLM ended:\nits log's end"), "vLLM ended:\nits log's end"),
        (ValueError("\x1b[31mwrong\x1b[0m"), "ValueError: wrong"),
        (KeyError("gate"), "KeyError: 'gate'"),
        (RuntimeError(f"the first line\n{TRACEBACK}"), "RuntimeError: the first line"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
    ],
)
def test_an_error_is_told_in_plain_words(error: BaseException, words: str) -> None:
    assert told(error) == words


def test_a_very_long_line_is_cut() -> None:
    assert len(told(ValueError("x" * 10_000))) < 600


def in_a_task(cause: Exception) -> Any:
    """What `ray.get` raises for it: of both classes, but with the attributes of the cause alone."""
    from ray.exceptions import RayTaskError

    error = RayTaskError("branch", TRACEBACK, cause, proctitle="ray::branch", pid=1, ip="1.2.3.4")
    return error.as_instanceof_cause()


def test_an_error_of_a_task_is_the_one_it_raised() -> None:
    cause = IndexError("index out of range in self")
    for error in (in_a_task(cause), in_a_task(in_a_task(cause))):
        found = cause_of(error)
        assert found is cause
        assert told(found) == "IndexError: index out of range in self"
    note = cause.__notes__[0]
    assert note.startswith("On its worker:\nray::branch() (pid=1")
    assert "\x1b" not in note


def test_a_users_error_of_a_task_has_no_traceback() -> None:
    cause = InputError("There are no tokens.")
    found = cause_of(in_a_task(cause))
    assert isinstance(found, MoestroError)
    assert not hasattr(found, "__notes__")
