"""What a running lifecycle shows: live bars on a terminal, a line per event elsewhere."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from moestro.artifacts import LifecycleRun, Record, StepRun
from moestro_flows.events import LISTENER
from moestro_flows.summary import figures

LINE_SECONDS = 10.0


class LiveProgress:
    """Listens to a lifecycle. On a terminal each running step has a bar; otherwise steps print when they begin and
    end, and every ten seconds in between."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars = Progress(
            TextColumn("{task.description:<18}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[message]}", style="dim"),
            console=console,
            disable=not console.is_terminal,
        )
        self.tasks: dict[str, TaskID] = {}
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
        """Give the step a bar."""
        with self.lock:
            self.tasks[step] = self.bars.add_task(step, total=None, message="")
            self.printed[step] = time.monotonic()

    def progress(self, step: str, done: int, total: int, message: str) -> None:
        """Move the step's bar."""
        with self.lock:
            self.bars.update(self.tasks[step], completed=done, total=total, message=message)
            if not self.console.is_terminal and time.monotonic() - self.printed[step] > LINE_SECONDS:
                self.printed[step] = time.monotonic()
                self.console.print(f"  ... {step}: {done}/{total} {message}", highlight=False)

    def ended(self, step: StepRun, record: Record | None) -> None:
        """Replace the step's bar by a line."""
        with self.lock:
            self.position += 1
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
