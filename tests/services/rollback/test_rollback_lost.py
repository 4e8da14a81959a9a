"""A canary whose process is lost again and again is ended; what it is not to blame for does not count."""

from typing import Any

from moestro_services.gateway.fleet import Fleet


def test_a_canary_that_is_lost_again_and_again_is_rolled_back(scene: Any) -> None:
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


def lose(scene: Any, times: int) -> None:
    """The process of version 2 ends so often, and is back each time."""
    (before,) = (state.restarts for state in scene.fleet.replicas() if state.version == "2")
    for restarts in range(before + 1, before + 1 + times):
        scene.servers["2"].gone.set()

        def back(fleet: Fleet, restarts: int = restarts) -> bool:
            states = [state for state in fleet.replicas() if state.version == "2"]
            return [(state.state, state.restarts) for state in states] == [("serving", restarts)]

        assert scene.fleet.wait_for(back, 30)


def test_a_canary_that_nobody_asks_and_that_only_crashes_is_ended(scene: Any) -> None:
    scene.registry(0.2, champion="1", challenger="2")
    lose(scene, scene.watch.rule.max_restarts - 1)
    assert scene.rolled.heard == []
    lose(scene, 1)
    scene.rolled.once("2")
    assert "was started again 3 times" in scene.rolled.heard[0][1]
    assert scene.watch.rollbacks == {"assistant": 1}


def test_a_canary_that_never_starts_is_ended(scene: Any) -> None:
    scene.servers["2"].refusals = scene.watch.rule.max_restarts
    scene.fleet.apply([scene.models.model(0.2, champion="1", challenger="2")])
    scene.rolled.once("2")


def test_crashes_before_the_canary_and_of_others_count_for_nothing(scene: Any) -> None:
    scene.registry(champion="1", challenger="2")
    assert scene.fleet.wait_for(lambda fleet: all(state.state == "serving" for state in fleet.replicas()), 30)
    lose(scene, scene.watch.rule.max_restarts)
    scene.registry(0.2, champion="1", challenger="2")
    lose(scene, scene.watch.rule.max_restarts - 1)
    scene.registry(champion="2", previous="1")
    lose(scene, scene.watch.rule.max_restarts)
    assert scene.rolled.heard == []


def test_a_canary_is_not_judged_by_what_was_asked_while_it_started(scene: Any) -> None:
    scene.servers["2"].may_start.clear()
    scene.fleet.apply([scene.models.model(0.2, champion="1", challenger="2")])
    scene.answers("2", 50, failed=50)
    scene.servers["2"].may_start.set()
    assert scene.fleet.wait_for(lambda fleet: fleet.table["assistant"].canary_share == 0.2, 30)
    scene.answers("2", 50)
    assert scene.rolled.heard == []


def test_a_canary_that_is_lost_and_then_ended_is_none(scene: Any) -> None:
    scene.registry(0.2, champion="1", challenger="2")
    scene.servers["2"].may_start.clear()
    scene.servers["2"].gone.set()
    assert scene.fleet.wait_for(lambda fleet: not fleet.table["assistant"].canary_share, 30)
    scene.registry(champion="1")
    scene.answers("2", 50, failed=50)
    assert scene.rolled.heard == []
    scene.servers["2"].may_start.set()
