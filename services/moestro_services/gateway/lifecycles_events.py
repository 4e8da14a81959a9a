"""The events file of a lifecycle: its lines as events, each named by where it ends, and what they add up to."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moestro_services.gateway.lifecycles_schemas import StepState

MAX_LINE_BYTES = 1 << 22
KINDS = frozenset({"planned", "started", "progress", "ended"})


@dataclass(frozen=True)
class Event:
    """One line of the file."""

    end: int
    """Where the line after it begins: with it one resumes."""
    kind: str
    content: dict[str, Any]


def read_events(path: Path, offset: int = 0) -> Iterator[Event]:
    """The events whose lines are complete, from `offset` on, the beginning of a line. None while there is no file."""
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        return
    with stream:
        stream.seek(offset)
        while (line := stream.readline(MAX_LINE_BYTES)).endswith(b"\n"):
            offset += len(line)
            content = _parsed(line)
            if content.get("event") in KINDS:
                yield Event(offset, content["event"], content)


def begins_line(path: Path, offset: int) -> bool:
    """Whether a line begins, or will begin, at `offset` of the file."""
    if offset == 0:
        return True
    try:
        with path.open("rb") as stream:
            stream.seek(offset - 1)
            return stream.read(1) == b"\n"
    except FileNotFoundError:
        return False


def _parsed(line: bytes) -> dict[str, Any]:
    """The line's object; numbers that are none become null, as JSON has none. Empty for what is no object."""
    try:
        content = json.loads(line, parse_constant=lambda _: None)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


class Story:
    """What the events of one file add up to so far. Reads on from where it was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run = ""
        self.steps: dict[str, StepState] = {}
        self._offset = 0

    def read_on(self) -> None:
        """Take in what was written since."""
        for event in read_events(self.path, self._offset):
            self._take(event.kind, event.content)
            self._offset = event.end

    def _take(self, kind: str, content: dict[str, Any]) -> None:
        if kind == "planned":
            self.run = content["run"]
            self.steps = {name: StepState(name=name, status="waiting") for name in content["steps"]}
            return
        name = content["step"]
        before = self.steps.get(name) or StepState(name=name, status="waiting")
        self.steps[name] = before.model_copy(update=_UPDATES[kind](content))


def _started(_: dict[str, Any]) -> dict[str, Any]:
    return {"status": "running"}


def _progressed(content: dict[str, Any]) -> dict[str, Any]:
    return {key: content[key] for key in ("done", "total", "message", "figures", "seconds", "seconds_left")}


def _ended(content: dict[str, Any]) -> dict[str, Any]:
    reused = content["reused"] and content["status"] == "completed"
    kept = {key: content[key] for key in ("message", "seconds", "fingerprint")}
    return {"status": "reused" if reused else content["status"], "seconds_left": None, **kept}


_UPDATES = {"started": _started, "progress": _progressed, "ended": _ended}
