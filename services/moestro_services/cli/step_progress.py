"""How far one running step is: what it reported last, and when it will be done at the pace it has."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moestro_services.cli.output import duration

SPEED = "tokens_per_second"


@dataclass
class StepProgress:
    """What a step reports. It may have several parts, such as tokenising and training, each counted by itself."""

    name: str
    done: int = 0
    total: int = 0
    """Units of the part; 0 until the first report."""
    message: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    """Figures it logged last, by name."""
    started: float = field(default_factory=time.monotonic)
    _first: tuple[float, int] | None = None
    """When the part was first heard of, and how far it was then: what a resumed step did before counts for no pace."""

    def progress(self, done: int, total: int, message: str) -> None:
        """It has done `done` of `total` units."""
        if self._first is None or total != self.total or done < self.done:
            self._first = (time.monotonic(), done)
        self.done, self.total, self.message = done, total, message

    def metrics(self, values: Mapping[str, float]) -> None:
        """It logged these."""
        self.figures.update(values)

    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.started

    def seconds_left(self) -> float | None:
        """Until its part is done, at the mean pace of the part; None while there is none yet."""
        if self._first is None or self.done <= self._first[1]:
            return None
        when, done = self._first
        return (time.monotonic() - when) / (self.done - done) * (self.total - self.done)

    def speed(self) -> str:
        """`12,345 tokens/s`; empty for a step that has no such figure."""
        return f"{self.figures[SPEED]:,.0f} tokens/s" if SPEED in self.figures else ""

    def left(self) -> str:
        """`4 min 05 s left`; empty while that is unknown."""
        seconds = self.seconds_left()
        return f"{duration(seconds)} left" if seconds else ""

    def line(self) -> str:
        """All of it in one line."""
        parts = [part for part in (self.message, self.speed(), self.left()) if part]
        return f"{self.name}: {self.done}/{self.total} {', '.join(parts)}".rstrip()

    def facts(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "step": self.name,
            "done": self.done,
            "total": self.total,
            "message": self.message,
            "figures": dict(self.figures),
            "seconds": round(self.seconds(), 1),
            "seconds_left": None if (left := self.seconds_left()) is None else round(left, 1),
        }
