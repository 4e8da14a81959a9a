"""Traffic follows the registry's aliases, never into a gap, and a canary's share is what was said."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from moestro.errors import ResourceError
from moestro_services.gateway.controller import Controller
from moestro_services.gateway.errors import UnavailableError, UnknownModelError
from moestro_services.gateway.fleet import Fleet
from moestro_services.gateway.replica import Backoff, State
from moestro_services.gateway.routes import share_of

WAIT = 30


@pytest.fixture
def three(fixed: Any, fixed_server: Any) -> Any:
    """Versions 1 to 3, of which the last two do not start before they may."""
    return fixed({"1": fixed_server(), "2": fixed_server(started=False), "3": fixed_server(started=False)})


@pytest.fixture
def fleet(three: Any) -> Iterator[Fleet]:
    with Fleet(three.open, backoff=Backoff(first=0.0)) as made:
        made.apply([three.model(champion="1")])
        assert made.wait_for(serves("1"), WAIT)
        yield made
        for server in three.servers.values():
            server.may_start.set()


def answers(fleet: Fleet, model: str = "assistant", sticky: str = "") -> str:
    return fleet.target(model, sticky).version.version


def serves(version: str, model: str = "assistant") -> Any:
    def holds(fleet: Fleet) -> bool:
        try:
            return answers(fleet, model) == version
        except (UnknownModelError, UnavailableError):
            return False

    return holds


def states(fleet: Fleet) -> dict[str, tuple[State, tuple[str, ...]]]:
    return {replica.version: (replica.state, replica.aliases) for replica in fleet.replicas()}


def test_a_champion_answers_until_the_next_one_does(fleet: Fleet, three: Any) -> None:
    fleet.apply([three.model(champion="2", previous="1")])
    assert states(fleet) == {
        "1": (State.SERVING, ("champion", "previous")),
        "2": (State.STARTING, ()),
    }
    for name in ("assistant", "assistant@champion", "assistant@1"):
        assert answers(fleet, name) == "1"
    with pytest.raises(UnavailableError, match="starting"):
        fleet.target("assistant@2", "")
    assert fleet.switches == {}
    three.servers["2"].may_start.set()
    assert fleet.wait_for(serves("2"), WAIT)
    assert states(fleet) == {"1": (State.SERVING, ("previous",)), "2": (State.SERVING, ("champion",))}
    assert answers(fleet, "assistant@previous") == "1"
    assert fleet.switches == {"assistant": 1}


def test_a_champion_that_cannot_start_gets_no_traffic(fleet: Fleet, three: Any) -> None:
    three.servers["2"].refusals = 3
    three.servers["2"].may_start.set()
    fleet.apply([three.model(champion="2", previous="1")])
    assert answers(fleet) == "1"
    assert fleet.wait_for(serves("2"), WAIT)
    assert three.servers["2"].starts == 4


def test_a_rollback_needs_no_start(fleet: Fleet, three: Any) -> None:
    three.servers["2"].may_start.set()
    fleet.apply([three.model(champion="2", previous="1")])
    assert fleet.wait_for(serves("2"), WAIT)
    fleet.apply([three.model(champion="1", previous="2")])
    assert answers(fleet) == "1"
    assert three.servers["1"].starts == 1


def test_who_is_nobodys_any_more_is_drained_first(fleet: Fleet, three: Any) -> None:
    three.servers["2"].may_start.set()
    replica, endpoint = fleet.enter("assistant", "")
    fleet.apply([three.model(champion="2")])
    assert fleet.wait_for(serves("2"), WAIT)
    assert fleet.wait_for(lambda fleet: states(fleet)["1"] == (State.DRAINING, ()), WAIT)
    assert fleet.endpoints()[1] == endpoint
    assert not three.servers["1"].gone.is_set()
    with pytest.raises(UnknownModelError, match="registered but not served"):
        fleet.target("assistant@1", "")
    replica.leave()
    assert fleet.wait_for(lambda fleet: len(fleet.replicas()) == 1, WAIT)
    assert three.servers["1"].gone.is_set()


def test_who_is_wanted_back_while_draining_goes_on(fleet: Fleet, three: Any) -> None:
    three.servers["2"].may_start.set()
    replica, _ = fleet.enter("assistant", "")
    fleet.apply([three.model(champion="2")])
    assert fleet.wait_for(serves("2"), WAIT)
    fleet.apply([three.model(champion="1", previous="2")])
    assert fleet.target("assistant", "") is replica
    replica.leave()
    assert three.servers["1"].starts == 1
    assert not three.servers["1"].gone.is_set()


def test_previous_is_not_started_for_its_own_sake(fleet: Fleet, three: Any) -> None:
    fleet.apply([three.model(champion="1", previous="3")])
    assert set(states(fleet)) == {"1"}
    with pytest.raises(UnknownModelError):
        fleet.target("assistant@previous", "")


def test_a_canary_takes_its_share_and_keeps_its_clients(fleet: Fleet, three: Any) -> None:
    three.servers["2"].may_start.set()
    fleet.apply([three.model(0.2, champion="1", challenger="2")])
    assert fleet.wait_for(serves("2", "assistant@challenger"), WAIT)
    clients = [f"client {number}" for number in range(4000)]
    first = [answers(fleet, sticky=client) for client in clients]
    assert Counter(first)["2"] / len(clients) == pytest.approx(0.2, abs=0.03)
    assert [answers(fleet, sticky=client) for client in clients] == first
    fleet.apply([three.model(0.5, champion="1", challenger="2")])
    more = [answers(fleet, sticky=client) for client in clients]
    assert all(now == "2" for now, before in zip(more, first, strict=True) if before == "2")
    assert {answers(fleet, "assistant@champion", client) for client in clients} == {"1"}
    fleet.apply([three.model(0.0, champion="1")])
    assert {answers(fleet, sticky=client) for client in clients} == {"1"}


def test_a_canary_that_is_starting_or_lost_takes_nothing(fleet: Fleet, three: Any) -> None:
    fleet.apply([three.model(1.0, champion="1", challenger="2")])
    assert answers(fleet) == "1"
    three.servers["2"].may_start.set()
    assert fleet.wait_for(serves("2"), WAIT)
    three.servers["2"].may_start.clear()
    three.servers["2"].gone.set()
    assert fleet.wait_for(serves("1"), WAIT)


def test_shares_differ_between_models() -> None:
    assert share_of("one", "client") == share_of("one", "client")
    assert share_of("one", "client") != share_of("two", "client")
    assert 0 <= share_of("one", "\ud800") < 1


def test_a_deleted_model_is_unknown(fleet: Fleet, three: Any) -> None:
    fleet.apply([])
    with pytest.raises(UnknownModelError):
        fleet.target("assistant", "")
    assert fleet.wait_for(lambda fleet: not fleet.replicas(), WAIT)
    assert fleet.ready == {}


def test_where_a_version_answers(fleet: Fleet, three: Any) -> None:
    deployment = fleet.target("assistant", "").deployment
    assert deployment is not None
    assert fleet.where(deployment).api_key == three.servers["1"].api_key
    three.servers["1"].may_start.clear()
    three.servers["1"].gone.set()
    assert fleet.wait_for(lambda fleet: not all(fleet.ready.values()), WAIT)
    with pytest.raises(ResourceError):
        fleet.where(deployment)


def test_closing_ends_all(three: Any) -> None:
    three.servers["2"].may_start.set()
    with Fleet(three.open) as fleet:
        fleet.apply([three.model(0.5, champion="1", challenger="2")])
        assert fleet.wait_for(serves("2", "assistant@2"), WAIT)
    assert all(three.servers[version].gone.is_set() for version in "12")
    with pytest.raises(UnavailableError):
        fleet.enter("assistant", "")


def test_the_controller_follows_and_survives_a_registry_that_cannot_be_read(
    fleet: Fleet, three: Any, caplog: pytest.LogCaptureFixture
) -> None:
    wanted: list[Any] = [three.model(champion="2", previous="1")]

    def read() -> Any:
        found = wanted[-1]
        if isinstance(found, Exception):
            raise found
        return [found]

    three.servers["2"].may_start.set()
    with Controller(fleet, read, poll_seconds=WAIT) as controller:
        assert fleet.wait_for(serves("2"), WAIT)
        for error in (ResourceError("MLflow is away."), OSError("odd")):
            wanted.append(error)
            controller.look()
            controller.look()
            assert controller.trouble
            assert not fleet.registry_up
            assert answers(fleet) == "2"
        assert caplog.text.count("MLflow is away.") == 1
        wanted.append(three.model(champion="1", previous="2"))
        fleet.kick()
        assert fleet.wait_for(serves("1"), WAIT)
    assert controller.trouble == ""
    assert fleet.registry_up
