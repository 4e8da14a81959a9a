"""What a running lifecycle tells programs: one JSON object a line, on standard error, while it runs."""

import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from moestro.artifacts import LifecycleRun, Record, StepRun
from moestro_flows.events import LISTENER
from moestro_services.cli.step_progress import StepProgress

EVERY_SECONDS = 2.0


class JsonEvents:
    """Listens to a lifecycle. Events are `planned` and, for each step, `started`, `progress` every other second, and
    `ended`."""

    def __init__(self, stream: TextIO | None = None, *, every: float = EVERY_SECONDS) -> None:
        self.stream = stream or sys.stderr
        self.every = every
        self.steps: dict[str, StepProgress] = {}
        self.written: dict[str, float] = {}
        self.lock = threading.Lock()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Write what happens in lifecycles that run inside the block."""
        token = LISTENER.set(self)
        try:
            yield
        finally:
            LISTENER.reset(token)

    def planned(self, run: LifecycleRun, steps: list[str]) -> None:
        """Say what begins."""
        with self.lock:
            self._write("planned", {"run": run.id, "name": run.name, "steps": steps})

    def started(self, step: str) -> None:
        """A step begins."""
        with self.lock:
            self.steps[step] = StepProgress(step)
            self._write("started", {"step": step})

    def progress(self, step: str, done: int, total: int, message: str) -> None:
        """A step goes on."""
        with self.lock:
            self.steps[step].progress(done, total, message)
            if time.monotonic() - self.written.get(step, -self.every) >= self.every:
                self.written[step] = time.monotonic()
                self._write("progress", self.steps[step].facts())

    def metrics(self, step: str, values: Mapping[str, float], at: int) -> None:  # noqa: ARG002  (progress says where)
        """A step's figures, for its next event."""
        with self.lock:
            self.steps[step].metrics(values)

    def ended(self, step: StepRun, record: Record | None) -> None:
        """A step is done, reused or failed."""
        with self.lock:
            self.steps.pop(step.name, None)
            said = step.model_dump(mode="json", include={"stage", "fingerprint", "status", "reused", "message"})
            outcome = {"seconds": round(step.seconds, 1), "result": record.result if record else None}
            self._write("ended", {"step": step.name, **said, **outcome})

    def _write(self, event: str, content: Mapping[str, Any]) -> None:
        self.stream.write(json.dumps({"event": event, **content}, ensure_ascii=False) + "\n")
        self.stream.flush()
