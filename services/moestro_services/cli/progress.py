"""What a running lifecycle shows: a live table of its running steps on a terminal, a line per event elsewhere."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column

from moestro.artifacts import LifecycleRun, Record, StepRun
from moestro_flows.events import LISTENER
from moestro_flows.summary import figures
from moestro_services.cli.step_progress import StepProgress

LINE_SECONDS = 10.0
WIDE = 110
"""Columns of a terminal from which there is room for bars and times."""


def _columns(width: int) -> list[ProgressColumn]:
    """What a row shows; where it is too long, what the step says of itself is wrapped."""
    wide = width >= WIDE
    return [
        TextColumn("{task.description:<18}", markup=False),
        *([BarColumn(bar_width=16)] if wide else []),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[message]}", markup=False, table_column=Column()),
        TextColumn("{task.fields[speed]}", justify="right"),
        TextColumn("{task.fields[left]}", justify="right"),
        *([TimeElapsedColumn(table_column=Column(no_wrap=True))] if wide else []),
    ]


class LiveProgress:
    """Listens to a lifecycle. On a terminal each running step has a row: how far it is, its loss, its speed and the
    time that is left. Otherwise it has a line every ten seconds. Steps that ended have a line."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars = Progress(*_columns(console.width), console=console, disable=not console.is_terminal)
        self.tasks: dict[str, TaskID] = {}
        self.steps: dict[str, StepProgress] = {}
        self.printed: dict[str, float] = {}
        self.position = 0
        self.total = 0
        self.lock = threading.Lock()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Show what happens in lifecycles that run inside the block."""
        token = LISTENER.set(self)
        try:
            with self.bars:
                yield
        finally:
            LISTENER.reset(token)

    def planned(self, run: LifecycleRun, steps: list[str]) -> None:
        """Say what begins."""
        self.total = len(steps)
        self.console.print(f"{run.name}: {len(steps)} steps, run {run.id}", highlight=False)

    def started(self, step: str) -> None:
        """Give the step a row."""
        with self.lock:
            self.steps[step] = StepProgress(step)
            self.tasks[step] = self.bars.add_task(step, total=None, message="waiting", speed="", left="")
            self.printed[step] = time.monotonic()

    def progress(self, step: str, done: int, total: int, message: str) -> None:
        """Move the step's bar."""
        with self.lock:
            said = self.steps[step]
            said.progress(done, total, message)
            self.bars.update(
                self.tasks[step], completed=done, total=total, message=message, speed=said.speed(), left=said.left()
            )
            if not self.console.is_terminal and time.monotonic() - self.printed[step] > LINE_SECONDS:
                self.printed[step] = time.monotonic()
                self.console.print(f"  ... {said.line()}", markup=False, highlight=False, soft_wrap=True)

    def metrics(self, step: str, values: Mapping[str, float], at: int) -> None:  # noqa: ARG002  (progress says where)
        """Figures for the step's row."""
        with self.lock:
            self.steps[step].metrics(values)

    def ended(self, step: StepRun, record: Record | None) -> None:
        """Replace the step's row by a line."""
        with self.lock:
            self.position += 1
            self.steps.pop(step.name, None)
            if step.name in self.tasks:
                self.bars.remove_task(self.tasks.pop(step.name))
            count = f"[{self.position:>{len(str(self.total))}}/{self.total}]"
            if step.status != "completed":
                self.console.print(f"{count} {step.name:<20} {step.status}", style="red", markup=False, highlight=False)
                return
            took = "reused" if step.reused else f"{step.seconds:.1f} s"
            text = figures(record) if record and not step.reused else ""
            style = "dim" if step.reused else None
            self.console.print(
                f"{count} {step.name:<20} {took:>8}  {text}", style=style, markup=False, highlight=False, soft_wrap=True
            )
