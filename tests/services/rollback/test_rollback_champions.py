"""A version that is new as champion is judged, also beside a canary; one that is not new stays."""

from typing import Any

import pytest

from moestro_services.gateway.watch import RETRY_SECONDS


def test_a_new_champion_is_judged_by_what_the_last_one_did(scene: Any) -> None:
    scene.answers("1", 50, ms=20)
    scene.registry(champion="2", previous="1")
    scene.answers("2", 50, ms=500)
    scene.rolled.once("2")
    scene.registry(champion="1", previous="2")
    scene.answers("1", 50, failed=50)
    assert len(scene.rolled.heard) == 1  # where one rolls back to is not new


@pytest.mark.parametrize("failing", ["2", "3"])
def test_a_young_champion_and_a_canary_are_judged_at_once(scene: Any, failing: str) -> None:
    scene.answers("1", 50)
    scene.registry(champion="2", previous="1")
    scene.answers("2", 10)
    scene.registry(0.2, champion="2", previous="1", challenger="3")
    for version in ("2", "3"):
        scene.answers(version, 50, failed=50 * (version == failing))
    scene.rolled.once(failing)


def test_a_canary_goes_on_against_the_champion_that_is_back(scene: Any) -> None:
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


def test_a_champion_that_is_still_called_the_canary_is_judged_as_champion(scene: Any) -> None:
    scene.answers("1", 50)
    scene.registry(0.2, champion="1", challenger="2")
    scene.registry(0.2, champion="2", previous="1", challenger="2")  # by hand: one alias after the other
    scene.registry(champion="2", previous="1")
    scene.answers("2", 50, failed=50)
    scene.rolled.once("2")


def test_a_canary_that_becomes_champion_is_judged_from_then_on_as_one(scene: Any) -> None:
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


def test_a_champion_of_some_time_stays(scene: Any) -> None:
    scene.answers("1", 50)
    scene.registry(champion="2", previous="1")
    scene.now += scene.watch.rule.champion_minutes * 60 + 1
    scene.answers("2", 50, failed=50)
    assert scene.rolled.heard == []


def test_a_champion_with_nothing_to_go_back_to_stays(scene: Any) -> None:
    scene.answers("1", 50)
    scene.registry(champion="2")
    scene.answers("2", 50, failed=50)
    assert scene.rolled.heard == []


def test_a_rollback_that_fails_is_tried_again(scene: Any) -> None:
    scene.rolled.busy = 1
    scene.registry(0.2, champion="1", challenger="2")
    scene.answers("2", 20, failed=20)
    scene.rolled.once("2")
    scene.answers("2", 100, failed=100)
    assert len(scene.rolled.heard) == 1  # each try is written down: not one a second
    scene.now += RETRY_SECONDS
    scene.answers("2", 20, failed=20)
    scene.rolled.times(2)


def test_a_rollback_that_found_nothing_to_change_is_not_counted(scene: Any) -> None:
    scene.rolled.changes = False
    scene.registry(0.2, champion="1", challenger="2")
    scene.answers("2", 20, failed=20)
    scene.rolled.once("2")
    assert scene.watch.rollbacks == {}


def test_the_first_champion_and_old_challengers_are_not_judged(scene: Any) -> None:
    scene.answers("1", 50, failed=50)
    scene.registry(champion="1", challenger="2")
    scene.answers("2", 50, failed=50)
    scene.registry(0.2, champion="1", challenger="2")
    scene.registry(champion="1")
    scene.answers("2", 50, failed=50)
    assert scene.rolled.heard == []
