"""What a user sees of steps that run at the same time: a row each on a terminal, lines elsewhere, JSON for programs."""

import io
import json
import time
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console

from moestro.artifacts import LifecycleRun, StepRun
from moestro_services.cli import progress as progress_module
from moestro_services.cli.json_events import JsonEvents
from moestro_services.cli.progress import LiveProgress
from moestro_services.cli.step_progress import StepProgress

NOW = datetime(2026, 1, 2, tzinfo=UTC)
RUN = LifecycleRun(id="r1", name="small", status="running", config={}, started_at=NOW)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def ended(name: str, **fields: Any) -> StepRun:
    fixed: dict[str, Any] = {"stage": "branch", "fingerprint": "f" * 64, "status": "completed", "reused": False}
    return StepRun(name=name, started_at=NOW, seconds=3.0, **fixed | fields)


def talk(listener: Any, clock: Clock) -> None:
    """Two branches that train side by side: one goes twice as fast as the other."""
    listener.planned(RUN, ["branch code", "branch math"])
    for name in ("branch code", "branch math"):
        listener.started(name)
    for step in range(5):
        clock.now += 10.5
        for name, pace in (("branch code", 2), ("branch math", 1)):
            done = 10 * pace * (step + 1)
            listener.metrics(name, {"loss": 3.0 - pace, "tokens_per_second": 1234.5 * pace}, done)
            listener.progress(name, done, 200, f"loss {3 - pace:.3f}")


@pytest.mark.parametrize("width", [80, 150])
def test_every_running_step_has_a_row_of_its_own(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    listener = LiveProgress(Console(file=io.StringIO(), force_terminal=True, width=width))
    talk(listener, clock)
    shown = Console(file=io.StringIO(), width=width)
    shown.print(listener.bars.get_renderable())
    assert isinstance(shown.file, io.StringIO)
    code, math = shown.file.getvalue().splitlines()
    for row, words in (
        (code, ("branch code", "100/200", "loss 1.000", "2,469 tokens/s", "52.5 s left")),
        (math, ("branch math", " 50/200", "loss 2.000", "1,234 tokens/s", "2 min 38 s left")),
    ):
        assert [word for word in words if word not in row] == []
    listener.ended(ended("branch code"), None)
    assert [task.description for task in listener.bars.tasks] == ["branch math"]


def test_a_step_that_has_not_reported_is_waiting() -> None:
    listener = LiveProgress(Console(file=io.StringIO(), force_terminal=True))
    listener.started("branch code")
    assert listener.bars.tasks[0].fields["message"] == "waiting"


def test_without_a_terminal_every_step_has_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, out = Clock(monkeypatch), io.StringIO()
    listener = LiveProgress(Console(file=out, width=60))
    talk(listener, clock)
    lines = out.getvalue().splitlines()
    assert lines[0] == "small: 2 steps, run r1"
    assert lines[-2:] == [
        "  ... branch code: 100/200 loss 1.000, 2,469 tokens/s, 52.5 s left",
        "  ... branch math: 50/200 loss 2.000, 1,234 tokens/s, 2 min 38 s left",
    ]
    assert len(lines) == 1 + 2 * 5
    monkeypatch.setattr(progress_module, "LINE_SECONDS", 1000.0)
    talk(listener, clock)
    assert len(out.getvalue().splitlines()) == len(lines) + 1


def test_programs_read_one_object_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, out = Clock(monkeypatch), io.StringIO()
    listener = JsonEvents(out)
    talk(listener, clock)
    listener.progress("branch code", 101, 200, "at once")  # too early for another event
    listener.ended(ended("branch code"), None)
    listener.ended(ended("branch math", status="failed", message="no tokens"), None)
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds == ["planned", "started", "started", *["progress"] * 10, "ended", "ended"]
    assert events[0]["steps"] == ["branch code", "branch math"]
    last = events[-4]
    assert (last["step"], last["done"], last["total"]) == ("branch code", 100, 200)
    assert last["figures"] == {"loss": 1.0, "tokens_per_second": 2469.0}
    assert last["seconds_left"] == 52.5
    assert [(event["status"], event["message"]) for event in events[-2:]] == [
        ("completed", ""),
        ("failed", "no tokens"),
    ]


def test_the_time_left_is_that_of_the_part_and_of_what_this_attempt_did(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    step = StepProgress("seed")
    assert step.seconds_left() is None
    step.progress(0, 3, "tokenising")
    clock.now += 30
    step.progress(3, 3, "tokenised")
    step.progress(101, 200, "loss 3")  # resumed at step 100
    assert step.seconds_left() is None
    clock.now += 4
    step.progress(103, 200, "loss 2")
    assert step.seconds_left() == pytest.approx(2 * 97)
    assert step.left() == "3 min 14 s left"
    step.progress(200, 200, "loss 1")
    assert step.left() == ""
