"""`Lifecycles`: those that were started over the API, each a process of its own that outlives the gateway.

    lifecycles/ID/lifecycle.json   what was asked for, by whom, and the process's mark
                  config.yaml      the complete config it runs
                  events.jsonl     what happens, a line each       result.json, log.txt   what it prints
                  stopped          there if it was told to stop

Whoever serves the home next finds them here: a gateway that is started again shows, follows and stops what its
predecessor started.
"""

import json
import os
import re
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from moestro.artifacts import LifecycleRun, disk_space_errors, exclusive
from moestro.config import Config, LifecycleConfig
from moestro.errors import BusyError, InputError
from moestro_flows.home import Home
from moestro_services.gateway.lifecycles_events import Story, read_events
from moestro_services.gateway.lifecycles_process import ProcessMark
from moestro_services.gateway.lifecycles_schemas import (
    LIFECYCLE_PATTERN,
    LifecycleDetail,
    LifecycleSummary,
    State,
    StepState,
)
from moestro_services.gateway.schemas import ErrorBody

COMMAND = (sys.executable, "-m", "moestro_services.cli")
REMEMBERED = 16
"""Of so many lifecycles it is kept in memory how far their events were read."""


class Started(Config):
    """The contents of `lifecycle.json`."""

    id: str
    """The lifecycle's id."""
    config: str
    """Name of the config."""
    changes: dict[str, Any]
    """What was changed in it."""
    actor: str
    """Who started it."""
    started_at: datetime
    """When (UTC)."""
    process: ProcessMark
    """Its process."""


class Lifecycles:
    """The lifecycles of `home`; `command` is what `run CONFIG ...` is appended to, for a process to be started."""

    def __init__(self, home: Home, *, command: Sequence[str] = COMMAND) -> None:
        self.home = home
        self.command = tuple(command)
        self._stories: OrderedDict[str, Story] = OrderedDict()
        self._reading = threading.Lock()

    def start(
        self,
        name: str,
        config: LifecycleConfig,
        changes: Mapping[str, Any],
        *,
        actor: str,
        audited: Callable[[str], None],
    ) -> LifecycleDetail:
        """Start `config`, which is the one called `name` with `changes` in it; `audited` is told the id before.

        Raises `BusyError` if a lifecycle, from here or from a terminal, has the home.
        """
        with exclusive(self.home.lifecycles / "start.lock", what="The start of a lifecycle"):
            self._refuse_if_busy()
            now = datetime.now(UTC)
            identity = f"{now:%Y%m%d-%H%M%S-%f}"
            audited(identity)
            folder = self.home.lifecycles / identity
            with disk_space_errors(folder):
                folder.mkdir(mode=0o700)
                (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
                process = self._spawn(folder)
                started = Started(
                    id=identity, config=name, changes=dict(changes), actor=actor, started_at=now, process=process
                )
                _write(folder / "lifecycle.json", started.model_dump_json(indent=2))
        return self.detail(identity)

    def _refuse_if_busy(self) -> None:
        for started in self._all():
            if started.process.running():
                raise BusyError(
                    f"Lifecycle {started.id} is running.",
                    hint=f"Wait for it to finish, or stop it: DELETE /api/lifecycles/{started.id}.",
                )
        with exclusive(self.home.lock, what="The home"):
            pass

    def _spawn(self, folder: Path) -> ProcessMark:
        """The process, in a session of its own: no signal to the gateway's reaches it, and it stays when that ends."""
        options = ["--json", "--no-ask", "--events", str(folder / "events.jsonl")]
        with (folder / "result.json").open("wb") as result, (folder / "log.txt").open("wb") as log:
            process = subprocess.Popen(
                [*self.command, "run", str(folder / "config.yaml"), *options],
                stdin=subprocess.DEVNULL,
                stdout=result,
                stderr=log,
                env={**os.environ, "MOESTRO_HOME": str(self.home.path)},
                start_new_session=True,
            )
        mark = ProcessMark.of(process.pid)
        threading.Thread(target=process.wait, name=f"lifecycle {process.pid}", daemon=True).start()
        return mark

    def stop(self, identity: str) -> bool:
        """Interrupt it, as Ctrl-C does; false if it had ended. Raises `InputError` if there is none."""
        started = self._find(identity)
        if not started.process.running():
            return False
        (self._folder(identity) / "stopped").touch()
        return started.process.interrupt()

    def summaries(self, *, limit: int, after: str | None = None) -> list[LifecycleSummary]:
        """The newest `limit`, of those that began before `after`."""
        found = [started for started in self._all() if after is None or started.id < after]
        return [self._summary(started) for started in found[:limit]]

    def detail(self, identity: str) -> LifecycleDetail:
        """One with its steps; raises `InputError` if there is none."""
        started = self._find(identity)
        summary = self._summary(started)  # before the events: what it has said when it ended is all that it says
        with self._reading:
            story = self._stories.pop(identity, None) or Story(self.events(identity))
            self._stories[identity] = story
            while len(self._stories) > REMEMBERED:
                self._stories.popitem(last=False)
            story.read_on()
            steps = tuple(story.steps.values())
        return LifecycleDetail(
            **summary.model_dump(), steps=_after(summary.state, steps), error=self._error(started, summary.state)
        )

    def events(self, identity: str) -> Path:
        """Its events file, which may not be there yet."""
        return self._folder(identity) / "events.jsonl"

    def process(self, identity: str) -> ProcessMark:
        """Its process, which may have ended; raises `InputError` if there is no such lifecycle."""
        return self._find(identity).process

    def _folder(self, identity: str) -> Path:
        return self.home.lifecycles / identity

    def _all(self) -> list[Started]:
        """Newest first."""
        found = (_read(folder / "lifecycle.json") for folder in sorted(self._folders().values(), reverse=True))
        return [started for started in found if started]

    def _folders(self) -> dict[str, Path]:
        """Those that are there, by id."""
        folder = self.home.lifecycles
        there = folder.iterdir() if folder.is_dir() else ()
        return {path.name: path for path in there if re.fullmatch(LIFECYCLE_PATTERN, path.name)}

    def _find(self, identity: str) -> Started:
        folder = self._folders().get(identity)
        started = _read(folder / "lifecycle.json") if folder else None
        if started is None:
            raise InputError(f"There is no lifecycle {identity!r}.", hint="GET /api/lifecycles lists them.")
        return started

    def _summary(self, started: Started) -> LifecycleSummary:
        running = started.process.running()  # before the files are read: what it wrote before it ended is there then
        first = next((event for event in read_events(self.events(started.id)) if event.kind == "planned"), None)
        run = first.content["run"] if first else ""
        told = started.model_dump(exclude={"process"})
        return LifecycleSummary(**told, run=run, state=self._state(started.id, run, running=running))

    def _state(self, identity: str, run: str, *, running: bool) -> State:
        stopped = (self._folder(identity) / "stopped").exists()
        if running:
            return "stopping" if stopped else "running" if run else "starting"
        if run and (record := self._record(run)) and record.status != "running":
            return record.status
        if _printed(self._folder(identity)).get("error"):
            return "failed"
        return "cancelled" if stopped else "lost"

    def _record(self, run: str) -> LifecycleRun | None:
        path = self.home.runs / f"{run}.json"
        try:
            return LifecycleRun.model_validate_json(path.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def _error(self, started: Started, state: State) -> ErrorBody | None:
        error = _printed(self._folder(started.id)).get("error") if state == "failed" else None
        return ErrorBody(**error) if error else None


def _after(state: State, steps: tuple[StepState, ...]) -> tuple[StepState, ...]:
    """The steps of a lifecycle in `state`: nothing runs any more in one whose process is gone."""
    if state in {"starting", "running", "stopping"}:
        return steps
    return tuple(
        step.model_copy(update={"status": "cancelled", "seconds_left": None}) if step.status == "running" else step
        for step in steps
    )


def _printed(folder: Path) -> dict[str, Any]:
    """The document that the process printed at its end; empty if it printed none."""
    try:
        printed = json.loads((folder / "result.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return printed if isinstance(printed, dict) else {}


def _read(path: Path) -> Started | None:
    try:
        return Started.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)
