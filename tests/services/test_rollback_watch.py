"""A canary or new champion that does worse is rolled back, once; what does as well, or is not new, stays."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from moestro.errors import BusyError
from moestro_services.gateway.fleet import Fleet
from moestro_services.gateway.replica import Backoff
from moestro_services.gateway.watch import RETRY_SECONDS, RollbackRule, Watch
from moestro_services.gateway.watch_window import LONGEST_WINDOW

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


def test_a_canary_that_fails_is_rolled_back_once(scene: Scene) -> None:
    scene.registry(0.2, champion="1", challenger="2")
    scene.answers("1", 100)
    scene.answers("2", 19, failed=19)
    assert scene.rolled.heard == []
    scene.answers("2", 50, failed=50)
    scene.rolled.once("2")
    assert scene.rolled.heard[0][0] == "assistant"
    assert "requests to version 2 failed" in scene.rolled.heard[0][1]
    assert scene.watch.rollbacks == {"assistant": 1}


def test_one_caller_alone_rolls_nothing_back(scene: Scene) -> None:
    scene.registry(0.2, champion="1", challenger="2")
    scene.answers("2", 30)
    scene.answers("2", 300, failed=300, callers=["mal"])
    scene.answers("2", 300, ms=5000, callers=["mal"])
    scene.answers("1", 100)
    scene.answers("2", 300, ms=5000, callers=["mal"])
    assert scene.rolled.heard == []


@pytest.mark.parametrize(("failed", "rolled"), [(2, False), (3, True)])
def test_what_one_caller_sees_is_borne_out_by_failures_of_others(scene: Scene, failed: int, rolled: bool) -> None:
    scene.registry(0.2, champion="1", challenger="2")
    scene.answers("1", 20)
    scene.answers("2", 5, failed=failed, callers=["bob"])
    scene.answers("2", 100, failed=100, callers=["ann"])
    if rolled:
        scene.rolled.once("2")
    assert bool(scene.rolled.heard) is rolled


def test_slowness_that_one_caller_sees_is_borne_out_by_others(scene: Scene) -> None:
    scene.registry(0.2, champion="1", challenger="2")
    scene.answers("1", 50)
    scene.answers("2", 50, ms=500, callers=["ann"])
    assert scene.rolled.heard == []
    scene.answers("2", 2, ms=500, callers=["bob"])
    assert scene.rolled.heard == []
    scene.answers("2", 20, ms=500, callers=["bob"])
    scene.rolled.once("2")


def test_where_there_is_one_caller_its_word_counts(scene: Scene) -> None:
    scene.answers("1", 50, callers=["local"])
    scene.registry(champion="2", previous="1")
    scene.answers("2", 20, failed=20, callers=["local"])
    scene.rolled.once("2")


def test_who_comes_first_waits_for_those_who_asked_the_predecessor(scene: Scene) -> None:
    scene.answers("1", 50)
    scene.registry(champion="2", previous="1")
    scene.answers("2", 100, failed=100, callers=["mal"])
    assert scene.rolled.heard == []
    scene.answers("2", 30, callers=["bob"])
    scene.now += RULE.window_seconds - 20
    scene.answers("2", 100, failed=100, callers=["mal"])
    assert scene.rolled.heard == []


def test_whom_nobody_joins_in_a_whole_window_is_believed(scene: Scene) -> None:
    scene.registry(0.2, champion="1", challenger="2")
    scene.now += RULE.window_seconds / 2
    scene.answers("1", 50)
    scene.answers("2", 50, failed=50, callers=["ann"])
    assert scene.rolled.heard == []
    scene.now += RULE.window_seconds / 2
    scene.answers("1", 50)
    scene.answers("2", 50, failed=50, callers=["ann"])
    scene.rolled.once("2")


def test_a_flood_does_not_wash_others_away(scene: Scene) -> None:
    scene.registry(0.2, champion="1", challenger="2")
    scene.now += RULE.window_seconds
    scene.watch.rule = replace(RULE, window_seconds=LONGEST_WINDOW / 4)
    scene.answers("2", 10, callers=["bob"])
    scene.answers("2", LONGEST_WINDOW + 10, failed=LONGEST_WINDOW + 10, callers=["mal"])
    assert scene.rolled.heard == []


def test_what_fails_on_both_sides_is_nobodys_fault(scene: Scene) -> None:
    scene.registry(0.2, champion="1", challenger="2")
    scene.answers("1", 100, failed=50)
    scene.answers("2", 100, failed=50)
    assert scene.rolled.heard == []


@pytest.mark.parametrize(("ms", "rolled"), [(35, False), (65, False), (75, True)])
def test_a_slow_canary_is_rolled_back(scene: Scene, ms: float, rolled: bool) -> None:
    scene.registry(0.2, champion="1", challenger="2")
    scene.answers("1", 30, ms=20, streamed=True)
    scene.answers("1", 30, ms=900)
    scene.answers("2", 60, ms=ms, streamed=True)
    if rolled:
        scene.rolled.once("2")
        assert "to the first byte" in scene.rolled.heard[0][1]
    assert bool(scene.rolled.heard) is rolled


def test_without_requests_to_the_other_version_slowness_is_not_judged(scene: Scene) -> None:
    scene.registry(0.2, champion="1", challenger="2")
    scene.answers("2", 100, ms=5000)
    assert scene.rolled.heard == []


def test_old_requests_do_not_count(scene: Scene) -> None:
    scene.registry(0.2, champion="1", challenger="2")
    scene.answers("2", 19, failed=19)
    scene.now += RULE.window_seconds
    scene.answers("2", 60)
    assert scene.rolled.heard == []


def test_a_new_champion_is_judged_by_what_the_last_one_did(scene: Scene) -> None:
    scene.answers("1", 50, ms=20)
    scene.registry(champion="2", previous="1")
    scene.answers("2", 50, ms=500)
    scene.rolled.once("2")
    scene.registry(champion="1", previous="2")
    scene.answers("1", 50, failed=50)
    assert len(scene.rolled.heard) == 1  # where one rolls back to is not new


@pytest.mark.parametrize("failing", ["2", "3"])
def test_a_young_champion_and_a_canary_are_judged_at_once(scene: Scene, failing: str) -> None:
    scene.answers("1", 50)
    scene.registry(champion="2", previous="1")
    scene.answers("2", 10)
    scene.registry(0.2, champion="2", previous="1", challenger="3")
    for version in ("2", "3"):
        scene.answers(version, 50, failed=50 * (version == failing))
    scene.rolled.once(failing)


def test_a_canary_goes_on_against_the_champion_that_is_back(scene: Scene) -> None:
    scene.answers("1", 50)
    scene.registry(champion="2", previous="1")
    scene.registry(0.2, champion="2", previous="1", challenger="3")
    for _ in range(10):  # both fail: the canary does no worse than what it is judged against
        scene.answers("2", 3, failed=3)
        scene.answers("3", 3, failed=3)
    scene.rolled.once("2")
    scene.registry(0.2, champion="1", previous="2", challenger="3")
    scene.answers("1", 30)
    scene.answers("3", 30, failed=30)
    scene.rolled.times(2)
    assert scene.rolled.heard[1][2] == "3"


def test_a_champion_that_is_still_called_the_canary_is_judged_as_champion(scene: Scene) -> None:
    scene.answers("1", 50)
    scene.registry(0.2, champion="1", challenger="2")
    scene.registry(0.2, champion="2", previous="1", challenger="2")  # by hand: one alias after the other
    scene.registry(champion="2", previous="1")
    scene.answers("2", 50, failed=50)
    scene.rolled.once("2")


def test_a_canary_that_becomes_champion_is_judged_from_then_on_as_one(scene: Scene) -> None:
    scene.answers("1", 50)
    scene.registry(0.2, champion="1", challenger="2")
    scene.answers("2", 15, failed=15)
    scene.registry(champion="2", previous="1")
    scene.answers("2", 15)
    scene.registry(0.2, champion="2", previous="1", challenger="3")
    scene.registry(champion="2", previous="1")
    assert scene.rolled.heard == []
    scene.answers("2", 50, failed=50)
    scene.rolled.once("2")


def test_a_champion_of_some_time_stays(scene: Scene) -> None:
    scene.answers("1", 50)
    scene.registry(champion="2", previous="1")
    scene.now += RULE.champion_minutes * 60 + 1
    scene.answers("2", 50, failed=50)
    assert scene.rolled.heard == []


def test_a_champion_with_nothing_to_go_back_to_stays(scene: Scene) -> None:
    scene.answers("1", 50)
    scene.registry(champion="2")
    scene.answers("2", 50, failed=50)
    assert scene.rolled.heard == []


def test_a_rollback_that_fails_is_tried_again(scene: Scene) -> None:
    scene.rolled.busy = 1
    scene.registry(0.2, champion="1", challenger="2")
    scene.answers("2", 20, failed=20)
    scene.rolled.once("2")
    scene.answers("2", 100, failed=100)
    assert len(scene.rolled.heard) == 1  # each try is written down: not one a second
    scene.now += RETRY_SECONDS
    scene.answers("2", 20, failed=20)
    scene.rolled.times(2)


def test_a_rollback_that_found_nothing_to_change_is_not_counted(scene: Scene) -> None:
    scene.rolled.changes = False
    scene.registry(0.2, champion="1", challenger="2")
    scene.answers("2", 20, failed=20)
    scene.rolled.once("2")
    assert scene.watch.rollbacks == {}


def test_the_first_champion_and_old_challengers_are_not_judged(scene: Scene) -> None:
    scene.answers("1", 50, failed=50)
    scene.registry(champion="1", challenger="2")
    scene.answers("2", 50, failed=50)
    scene.registry(0.2, champion="1", challenger="2")
    scene.registry(champion="1")
    scene.answers("2", 50, failed=50)
    assert scene.rolled.heard == []


def test_a_canary_that_is_lost_again_and_again_is_rolled_back(scene: Scene) -> None:
    scene.registry(0.2, champion="1", challenger="2")
    server = scene.servers["2"]
    for starts in (2, 3):
        server.may_start.clear()
        server.gone.set()
        assert scene.fleet.wait_for(lambda fleet: not fleet.table["assistant"].canary_share, 30)
        scene.answers("2", 10, failed=10)
        server.may_start.set()
        assert scene.fleet.wait_for(lambda fleet: fleet.table["assistant"].canary_share == 0.2, 30)
        assert server.starts == starts
    scene.answers("2", 1, failed=1)
    scene.rolled.once("2")


def lose(scene: Scene, times: int) -> None:
    """The process of version 2 ends so often, and is back each time."""
    (before,) = (state.restarts for state in scene.fleet.replicas() if state.version == "2")
    for restarts in range(before + 1, before + 1 + times):
        scene.servers["2"].gone.set()

        def back(fleet: Fleet, restarts: int = restarts) -> bool:
            states = [state for state in fleet.replicas() if state.version == "2"]
            return [(state.state, state.restarts) for state in states] == [("serving", restarts)]

        assert scene.fleet.wait_for(back, 30)


def test_a_canary_that_nobody_asks_and_that_only_crashes_is_ended(scene: Scene) -> None:
    scene.registry(0.2, champion="1", challenger="2")
    lose(scene, RULE.max_restarts - 1)
    assert scene.rolled.heard == []
    lose(scene, 1)
    scene.rolled.once("2")
    assert "was started again 3 times" in scene.rolled.heard[0][1]
    assert scene.watch.rollbacks == {"assistant": 1}


def test_a_canary_that_never_starts_is_ended(scene: Scene) -> None:
    scene.servers["2"].refusals = RULE.max_restarts
    scene.fleet.apply([scene.models.model(0.2, champion="1", challenger="2")])
    scene.rolled.once("2")


def test_crashes_before_the_canary_and_of_others_count_for_nothing(scene: Scene) -> None:
    scene.registry(champion="1", challenger="2")
    assert scene.fleet.wait_for(lambda fleet: all(state.state == "serving" for state in fleet.replicas()), 30)
    lose(scene, RULE.max_restarts)
    scene.registry(0.2, champion="1", challenger="2")
    lose(scene, RULE.max_restarts - 1)
    scene.registry(champion="2", previous="1")
    lose(scene, RULE.max_restarts)
    assert scene.rolled.heard == []


def test_a_canary_is_not_judged_by_what_was_asked_while_it_started(scene: Scene) -> None:
    scene.servers["2"].may_start.clear()
    scene.fleet.apply([scene.models.model(0.2, champion="1", challenger="2")])
    scene.answers("2", 50, failed=50)
    scene.servers["2"].may_start.set()
    assert scene.fleet.wait_for(lambda fleet: fleet.table["assistant"].canary_share == 0.2, 30)
    scene.answers("2", 50)
    assert scene.rolled.heard == []


def test_a_canary_that_is_lost_and_then_ended_is_none(scene: Scene) -> None:
    scene.registry(0.2, champion="1", challenger="2")
    scene.servers["2"].may_start.clear()
    scene.servers["2"].gone.set()
    assert scene.fleet.wait_for(lambda fleet: not fleet.table["assistant"].canary_share, 30)
    scene.registry(champion="1")
    scene.answers("2", 50, failed=50)
    assert scene.rolled.heard == []
    scene.servers["2"].may_start.set()
