"""A canary that does worse is rolled back, once; what does as well stays, and others bear out what one caller sees."""

from dataclasses import replace
from typing import Any

import pytest

from moestro_services.gateway.watch_window import LONGEST_WINDOW


def test_a_canary_that_fails_is_rolled_back_once(scene: Any) -> None:
    scene.registry(0.2, champion="1", challenger="2")
    scene.answers("1", 100)
    scene.answers("2", 19, failed=19)
    assert scene.rolled.heard == []
    scene.answers("2", 50, failed=50)
    scene.rolled.once("2")
    assert scene.rolled.heard[0][0] == "assistant"
    assert "requests to version 2 failed" in scene.rolled.heard[0][1]
    assert scene.watch.rollbacks == {"assistant": 1}


def test_one_caller_alone_rolls_nothing_back(scene: Any) -> None:
    scene.registry(0.2, champion="1", challenger="2")
    scene.answers("2", 30)
    scene.answers("2", 300, failed=300, callers=["mal"])
    scene.answers("2", 300, ms=5000, callers=["mal"])
    scene.answers("1", 100)
    scene.answers("2", 300, ms=5000, callers=["mal"])
    assert scene.rolled.heard == []


@pytest.mark.parametrize(("failed", "rolled"), [(2, False), (3, True)])
def test_what_one_caller_sees_is_borne_out_by_failures_of_others(scene: Any, failed: int, rolled: bool) -> None:
    scene.registry(0.2, champion="1", challenger="2")
    scene.answers("1", 20)
    scene.answers("2", 5, failed=failed, callers=["bob"])
    scene.answers("2", 100, failed=100, callers=["ann"])
    if rolled:
        scene.rolled.once("2")
    assert bool(scene.rolled.heard) is rolled


def test_slowness_that_one_caller_sees_is_borne_out_by_others(scene: Any) -> None:
    scene.registry(0.2, champion="1", challenger="2")
    scene.answers("1", 50)
    scene.answers("2", 50, ms=500, callers=["ann"])
    assert scene.rolled.heard == []
    scene.answers("2", 2, ms=500, callers=["bob"])
    assert scene.rolled.heard == []
    scene.answers("2", 20, ms=500, callers=["bob"])
    scene.rolled.once("2")


def test_where_there_is_one_caller_its_word_counts(scene: Any) -> None:
    scene.answers("1", 50, callers=["local"])
    scene.registry(champion="2", previous="1")
    scene.answers("2", 20, failed=20, callers=["local"])
    scene.rolled.once("2")


def test_who_comes_first_waits_for_those_who_asked_the_predecessor(scene: Any) -> None:
    scene.answers("1", 50)
    scene.registry(champion="2", previous="1")
    scene.answers("2", 100, failed=100, callers=["mal"])
    assert scene.rolled.heard == []
    scene.answers("2", 30, callers=["bob"])
    scene.now += scene.watch.rule.window_seconds - 20
    scene.answers("2", 100, failed=100, callers=["mal"])
    assert scene.rolled.heard == []


def test_whom_nobody_joins_in_a_whole_window_is_believed(scene: Any) -> None:
    scene.registry(0.2, champion="1", challenger="2")
    scene.now += scene.watch.rule.window_seconds / 2
    scene.answers("1", 50)
    scene.answers("2", 50, failed=50, callers=["ann"])
    assert scene.rolled.heard == []
    scene.now += scene.watch.rule.window_seconds / 2
    scene.answers("1", 50)
    scene.answers("2", 50, failed=50, callers=["ann"])
    scene.rolled.once("2")


def test_a_flood_does_not_wash_others_away(scene: Any) -> None:
    scene.registry(0.2, champion="1", challenger="2")
    scene.now += scene.watch.rule.window_seconds
    scene.watch.rule = replace(scene.watch.rule, window_seconds=LONGEST_WINDOW / 4)
    scene.answers("2", 10, callers=["bob"])
    scene.answers("2", LONGEST_WINDOW + 10, failed=LONGEST_WINDOW + 10, callers=["mal"])
    assert scene.rolled.heard == []


def test_what_fails_on_both_sides_is_nobodys_fault(scene: Any) -> None:
    scene.registry(0.2, champion="1", challenger="2")
    scene.answers("1", 100, failed=50)
    scene.answers("2", 100, failed=50)
    assert scene.rolled.heard == []


@pytest.mark.parametrize(("ms", "rolled"), [(35, False), (65, False), (75, True)])
def test_a_slow_canary_is_rolled_back(scene: Any, ms: float, rolled: bool) -> None:
    scene.registry(0.2, champion="1", challenger="2")
    scene.answers("1", 30, ms=20, streamed=True)
    scene.answers("1", 30, ms=900)
    scene.answers("2", 60, ms=ms, streamed=True)
    if rolled:
        scene.rolled.once("2")
        assert "to the first byte" in scene.rolled.heard[0][1]
    assert bool(scene.rolled.heard) is rolled


def test_without_requests_to_the_other_version_slowness_is_not_judged(scene: Any) -> None:
    scene.registry(0.2, champion="1", challenger="2")
    scene.answers("2", 100, ms=5000)
    assert scene.rolled.heard == []


def test_old_requests_do_not_count(scene: Any) -> None:
    scene.registry(0.2, champion="1", challenger="2")
    scene.answers("2", 19, failed=19)
    scene.now += scene.watch.rule.window_seconds
    scene.answers("2", 60)
    assert scene.rolled.heard == []
