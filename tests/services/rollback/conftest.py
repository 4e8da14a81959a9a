"""A fleet of three versions whose answers a test makes up, and a watch over it."""

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from moestro.errors import BusyError
from moestro_services.gateway.fleet import Fleet
from moestro_services.gateway.replica import Backoff
from moestro_services.gateway.watch import RollbackRule, Watch

RULE = RollbackRule(min_requests=20, max_error_excess=0.1, max_latency_ratio=2.0, latency_slack_seconds=0.05)


class Rolled:
    """Hears of rollbacks."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, str, str]] = []
        """Model, reason and version."""
        self.changed = threading.Condition()
        self.busy = 0
        self.changes = True

    def __call__(self, name: str, version: str, reason: str) -> bool:
        with self.changed:
            self.heard.append((name, reason, version))
            self.changed.notify_all()
            if self.busy:
                self.busy -= 1
                raise BusyError("Somebody promotes.")
        return self.changes

    def times(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.heard) >= count, 30)
        for thread in [thread for thread in threading.enumerate() if thread.name == "rollback"]:
            thread.join(30)
        assert len(self.heard) == count

    def once(self, version: str) -> None:
        """One rollback was asked for, of this version."""
        self.times(1)
        assert self.heard[0][2] == version


class Scene:
    """A fleet of three versions whose answers a test makes up."""

    def __init__(self, fleet: Fleet, models: Any) -> None:
        self.fleet = fleet
        self.models = models
        self.servers = models.servers
        self.now = 1000.0
        self.rolled = Rolled()
        self.watch = Watch(RULE, self.rolled, clock=lambda: self.now)
        fleet.watchers.append(self.watch.follow)

    def registry(self, share: float = 0.0, **aliases: str) -> None:
        self.fleet.apply([self.models.model(share, **aliases)])
        wanted = aliases["champion"]
        assert self.fleet.wait_for(lambda fleet: fleet.ready == {"assistant": True}, 30)
        assert self.fleet.wait_for(lambda fleet: fleet.target("assistant@champion", "").version.version == wanted, 30)
        if share:
            assert self.fleet.wait_for(lambda fleet: fleet.table["assistant"].canary_share == share, 30)

    def answers(
        self,
        version: str,
        count: int,
        *,
        failed: int = 0,
        ms: float = 20,
        streamed: bool = False,
        callers: Sequence[str] = ("ann", "bob", "cy"),
    ) -> None:
        """So many answers to `callers` in turn."""
        for number in range(count):
            self.now += 0.1
            bad = number * failed % count < failed  # spread evenly
            self.watch.answered(
                "assistant",
                version,
                caller=callers[number % len(callers)],
                failed=bad,
                streamed=streamed,
                seconds=None if bad else ms / 1000,
            )


@pytest.fixture
def scene(fixed: Any, fixed_server: Any) -> Iterator[Scene]:
    models = fixed({version: fixed_server() for version in ("1", "2", "3")})
    with Fleet(models.open, backoff=Backoff(first=0.0)) as fleet:
        made = Scene(fleet, models)
        made.registry(champion="1")
        yield made
