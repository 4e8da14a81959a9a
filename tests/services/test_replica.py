"""A replica starts its process, notices its end, starts it again ever less often, and drains before it ends."""

import threading
from typing import Any

import pytest

from moestro.errors import ArtifactError
from moestro_services.gateway.replica import MISSES, Backoff, Replica, State

WAIT = 30


class Steps:
    """Hands a test the moments at which the replica would wait before it starts its process again."""

    def __init__(self) -> None:
        self.delays: list[float] = []
        self.changed = threading.Condition()
        self.allowed = 0
        self.now = 0.0

    def pause(self, ending: threading.Event, seconds: float) -> bool:
        with self.changed:
            self.delays.append(seconds)
            self.changed.notify_all()
            while self.allowed < len(self.delays) and not ending.is_set():
                self.changed.wait(0.01)
        return ending.is_set()

    def notice(self) -> None:
        with self.changed:
            self.changed.notify_all()

    def until(self, predicate: Any) -> None:
        with self.changed:
            assert self.changed.wait_for(predicate, WAIT)

    def go_on(self) -> None:
        with self.changed:
            self.allowed += 1
            self.changed.notify_all()


@pytest.fixture
def steps() -> Steps:
    return Steps()


def replica_of(models: Any, steps: Steps, backoff: Backoff | None = None, opener: Any = None) -> Replica:
    version = models.model().versions[0]
    return Replica(
        version,
        opener or models.open,
        changed=steps.notice,
        backoff=backoff or Backoff(),
        clock=lambda: steps.now,
        pause=steps.pause,
        check_seconds=0.01,
    )


def test_delays_grow_to_a_bound_and_never_end() -> None:
    backoff = Backoff(first=1, factor=2, longest=60)
    assert [backoff.delay(losses) for losses in (1, 2, 3, 6, 7, 8, 10_000)] == [1, 2, 4, 32, 60, 60, 60]


def test_a_lost_process_is_started_again_with_another_key(fixed: Any, fixed_server: Any, steps: Steps) -> None:
    server = fixed_server()
    replica = replica_of(fixed({"1": server}), steps)
    steps.until(lambda: replica.serving)
    first = replica.endpoint
    server.gone.set()
    steps.until(lambda: steps.delays == [1.0])
    assert (replica.state, replica.reason, replica.enter()) == (State.LOST, "The process ended.", None)
    steps.go_on()
    steps.until(lambda: replica.serving)
    assert replica.restarts == 1
    assert first is not None
    assert replica.endpoint is not None
    assert (replica.endpoint.start, first.start) == (1, 0)
    assert replica.endpoint.api_key != first.api_key
    assert replica.retire(0)
    assert server.gone.is_set()


def test_starts_that_fail_come_ever_less_often_until_one_holds(fixed: Any, fixed_server: Any, steps: Steps) -> None:
    server = fixed_server(refusals=3)
    replica = replica_of(fixed({"1": server}), steps, Backoff(longest=3, settled=100))
    for delays in ([1], [1, 2], [1, 2, 3]):
        steps.until(lambda delays=delays: steps.delays == delays)
        assert replica.reason == "No memory."
        steps.go_on()
    steps.until(lambda: replica.serving)
    server.gone.set()
    steps.until(lambda: len(steps.delays) == 4)
    steps.go_on()
    steps.until(lambda: replica.serving)
    steps.now = 1000.0
    server.gone.set()
    steps.until(lambda: steps.delays == [1, 2, 3, 3, 1])
    assert replica.retire(0)


def test_what_is_not_there_is_looked_for_again(fixed: Any, fixed_server: Any, steps: Steps) -> None:
    models, missing = fixed({"1": fixed_server()}), [True]

    def opener(version: Any) -> Any:
        if missing.pop():
            raise ArtifactError("The checkpoint is not there.")
        missing.append(False)
        return models.open(version)

    missing.insert(0, False)
    replica = replica_of(models, steps, opener=opener)
    steps.until(lambda: len(steps.delays) == 1)
    assert (replica.state, replica.reason) == (State.LOST, "The checkpoint is not there.")
    steps.go_on()
    steps.until(lambda: replica.serving)
    assert replica.retire(0)


def test_a_process_that_does_not_answer_is_ended(fixed: Any, fixed_server: Any, steps: Steps) -> None:
    server = fixed_server()
    server.well = False
    replica = replica_of(fixed({"1": server}), steps)
    steps.until(lambda: steps.delays == [1.0])
    assert replica.reason == "The process runs but does not answer."
    assert server.stops == 1
    assert MISSES > 1
    assert replica.retire(0)


def test_a_failing_endpoint_is_given_up_at_once_and_only_once(fixed: Any, fixed_server: Any, steps: Steps) -> None:
    server = fixed_server()
    replica = replica_of(fixed({"1": server}), steps)
    steps.until(lambda: replica.serving)
    endpoint = replica.enter()
    assert endpoint is not None
    replica.fail(endpoint, "Its engine is dead.")
    assert (replica.enter(), replica.state) == (None, State.LOST)
    steps.until(lambda: steps.delays == [1.0])
    assert replica.reason == "Its engine is dead."
    steps.go_on()
    steps.until(lambda: replica.serving)
    replica.fail(endpoint, "An answer of before.")
    assert replica.serving
    replica.leave()
    assert replica.retire(0)


def test_it_ends_when_its_last_request_is_over(fixed: Any, fixed_server: Any, steps: Steps) -> None:
    server = fixed_server()
    replica = replica_of(fixed({"1": server}), steps)
    steps.until(lambda: replica.serving)
    assert replica.enter()
    assert replica.enter()
    ended: list[bool] = []
    retiring = threading.Thread(target=lambda: ended.append(replica.retire(WAIT)))
    retiring.start()
    while replica.state is not State.DRAINING:
        retiring.join(0.001)
    assert replica.enter() is None
    replica.leave()
    retiring.join(0.05)
    assert not server.gone.is_set()
    replica.leave()
    retiring.join(WAIT)
    assert (ended, server.gone.is_set(), replica.resume()) == ([True], True, False)


def test_it_ends_after_a_bounded_time_whatever_its_requests_do(fixed: Any, fixed_server: Any, steps: Steps) -> None:
    server = fixed_server()
    replica = replica_of(fixed({"1": server}), steps)
    steps.until(lambda: replica.serving)
    assert replica.enter()
    assert replica.retire(0.01)
    assert server.gone.is_set()


def test_draining_can_be_taken_back(fixed: Any, fixed_server: Any, steps: Steps) -> None:
    server = fixed_server()
    replica = replica_of(fixed({"1": server}), steps)
    steps.until(lambda: replica.serving)
    assert replica.enter()
    ended: list[bool] = []
    retiring = threading.Thread(target=lambda: ended.append(replica.retire(WAIT)))
    retiring.start()
    while replica.state is not State.DRAINING:
        retiring.join(0.001)
    assert replica.resume()
    retiring.join(WAIT)
    assert ended == [False]
    assert replica.serving
    assert not server.gone.is_set()
    assert replica.retire(0)


def test_it_can_be_ended_while_it_starts(fixed: Any, fixed_server: Any, steps: Steps) -> None:
    server = fixed_server(started=False)
    server.stop = server.may_start.set
    replica = replica_of(fixed({"1": server}), steps)
    steps.until(lambda: server.starts == 1)
    assert replica.retire(0)
    assert replica.state is State.DRAINING
