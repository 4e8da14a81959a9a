"""What a lifecycle tells whoever watches it, such as the terminal."""

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Protocol

from moestro.artifacts import LifecycleRun, Record, StepRun


class Listener(Protocol):
    """Called from several threads."""

    def planned(self, run: LifecycleRun, steps: list[str]) -> None:
        """The run begins; these are its steps."""

    def started(self, step: str) -> None:
        """A step begins."""

    def progress(self, step: str, done: int, total: int, message: str) -> None:
        """A step has done `done` of `total` units."""

    def metrics(self, step: str, values: Mapping[str, float], at: int) -> None:
        """A step's figures after `at` of its units, such as `loss` and `tokens_per_second`."""

    def ended(self, step: StepRun, record: Record | None) -> None:
        """A step is done, reused or failed."""


class Silence:
    """Nobody watches."""

    def planned(self, run: LifecycleRun, steps: list[str]) -> None:
        """Ignore."""

    def started(self, step: str) -> None:
        """Ignore."""

    def progress(self, step: str, done: int, total: int, message: str) -> None:
        """Ignore."""

    def metrics(self, step: str, values: Mapping[str, float], at: int) -> None:
        """Ignore."""

    def ended(self, step: StepRun, record: Record | None) -> None:
        """Ignore."""


LISTENER: ContextVar[Listener] = ContextVar("LISTENER", default=Silence())  # noqa: B039  (it holds no state)
"""Who watches the lifecycles of this context; a context variable since a flow's parameters must be plain data."""
