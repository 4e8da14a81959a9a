"""The gateway under load before two versions over real HTTP: switches, rollbacks and canaries fail no request."""

import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from moestro_flows.home import Home
from moestro_services.gateway.app import Parts, create_app
from moestro_services.gateway.fleet import Fleet
from moestro_services.gateway.listening import listen, serving
from moestro_services.gateway.watch import RollbackRule, Watch

ASK: dict[str, Any] = {"model": "assistant", "prompt": "12 + 7 =", "max_tokens": 4}
CLIENTS = 6
WAIT = 30


class Load:
    """Clients that ask and ask again, with and without streaming, until the block is left."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.seen: Counter[tuple[int, str]] = Counter()
        self.broken: list[BaseException] = []
        self._changed = threading.Condition()
        self._over = False
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(CLIENTS)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        for thread in self._threads:
            thread.join(WAIT)

    def more(self, count: int, version: str = "") -> None:
        """Wait for so many more answers, of a version if one is given."""
        with self._changed:
            wanted = self._answers(version) + count
            assert self._changed.wait_for(lambda: self._answers(version) >= wanted or self.broken, WAIT)

    def _answers(self, version: str) -> int:
        return sum(count for (_, found), count in self.seen.items() if version in found)

    def _ask(self, number: int) -> None:
        with httpx.Client(timeout=WAIT, headers={"X-Session-Id": f"client {number}"}) as client:
            while not self._over:
                try:
                    response = client.post(self.url + "/v1/completions", json=ASK | {"stream": bool(number % 2)})
                except httpx.HTTPError as error:
                    self.broken.append(error)
                    return
                found = next((name for name in ("@1", "@2") if f'"assistant{name}"' in response.text), response.text)
                whole = response.text.endswith(("data: [DONE]\n\n", "}}"))
                with self._changed:
                    self.seen[response.status_code, found if whole else "broken off"] += 1
                    self._changed.notify_all()


@pytest.fixture
def url(tmp_path: Path, fleet: Fleet) -> Iterator[str]:
    with serving(create_app(Parts(home=Home(tmp_path), fleet=fleet)), listen("127.0.0.1", 0)) as found:
        yield found


def test_promotions_and_rollbacks_under_load_fail_no_request(url: str, fleet: Fleet, models: Any) -> None:
    with Load(url) as load:
        load.more(20, "@1")
        for champion, previous in (("2", "1"), ("1", "2"), ("2", "1"), ("1", "2")):
            fleet.apply([models.model(champion=champion, previous=previous)])
            load.more(40, f"@{champion}")
    assert load.broken == []
    assert set(load.seen) == {(200, "@1"), (200, "@2")}
    assert fleet.switches == {"assistant": 4}


def test_a_version_is_replaced_for_good_under_load(url: str, fleet: Fleet, models: Any) -> None:
    with Load(url) as load:
        load.more(20, "@1")
        fleet.apply([models.model(champion="2")])
        load.more(40, "@2")
        assert fleet.wait_for(lambda fleet: len(fleet.replicas()) == 1, WAIT)
        load.more(40, "@2")
    assert models.servers["1"].gone.is_set()
    assert load.broken == []
    assert set(load.seen) == {(200, "@1"), (200, "@2")}


def test_a_request_in_flight_is_finished_by_the_version_it_began_with(
    url: str, fleet: Fleet, models: Any, upstream: Any
) -> None:
    answers: list[httpx.Response] = []
    asking = threading.Thread(
        target=lambda: answers.append(httpx.post(url + "/v1/completions", json=ASK | {"prompt": "hold"}, timeout=WAIT))
    )
    asking.start()
    assert upstream.began.wait(WAIT)
    fleet.apply([models.model(champion="2")])
    assert fleet.wait_for(lambda fleet: any(state.state == "draining" for state in fleet.replicas()), WAIT)
    assert httpx.post(url + "/v1/completions", json=ASK).json()["system_fingerprint"] == "assistant@2"
    upstream.go.set()
    asking.join(WAIT)
    assert answers[0].json()["system_fingerprint"] == "assistant@1"
    assert fleet.wait_for(lambda fleet: len(fleet.replicas()) == 1, WAIT)


def test_a_lost_server_under_load_gives_clean_503s_and_comes_back(url: str, fleet: Fleet, models: Any) -> None:
    server = models.servers["1"]
    with Load(url) as load:
        load.more(20, "@1")
        server.may_start.clear()
        server.gone.set()
        load.more(20, "does not answer now")
        server.may_start.set()
        assert fleet.wait_for(lambda fleet: all(fleet.ready.values()), WAIT)
        load.more(40, "@1")
    assert load.broken == []
    assert {status for status, _ in load.seen} == {200, 503}


def test_canaries_go_by_session_then_user_then_key(url: str, fleet: Fleet, models: Any) -> None:
    fleet.apply([models.model(0.5, champion="1", challenger="2")])
    assert fleet.wait_for(lambda fleet: fleet.table["assistant"].canary_share == 0.5, WAIT)

    names = [f"name {number}" for number in range(40)]
    with httpx.Client(base_url=url) as client:

        def version(headers: dict[str, str], **fields: str) -> str:
            answer = client.post("/v1/completions", json=ASK | fields, headers=headers).json()
            return str(answer["system_fingerprint"])

        by_session = [version({"X-Session-Id": name}) for name in names]
        assert {"assistant@1", "assistant@2"} == set(by_session)
        assert [version({"X-Session-Id": name}, user="other") for name in names] == by_session
        assert [version({}, user=name) for name in names] == by_session
        assert len({version({}) for _ in range(10)}) == 1


def test_a_canary_that_fails_is_rolled_back_by_itself(
    tmp_path: Path, fleet: Fleet, models: Any, second_upstream: Any
) -> None:
    rolled = threading.Event()

    def roll_back(name: str, version: str, reason: str) -> bool:
        assert (name, version) == ("assistant", "2")
        assert "version 2 failed" in reason
        fleet.apply([models.model(champion="1")])
        rolled.set()
        return True

    watch = Watch(RollbackRule(min_requests=10), roll_back, clock=lambda: 0.0)
    fleet.watchers.append(watch.follow)
    fleet.apply([models.model(0.5, champion="1", challenger="2")])
    assert fleet.wait_for(lambda fleet: fleet.table["assistant"].canary_share == 0.5, WAIT)
    parts = Parts(home=Home(tmp_path), fleet=fleet, watch=watch)
    with serving(create_app(parts), listen("127.0.0.1", 0)) as url, httpx.Client(base_url=url) as client:
        for _ in range(10):
            assert client.post("/v1/completions", json=ASK | {"model": "assistant@2", "prompt": "fail"}).is_error
        assert rolled.wait(WAIT)
        users = [f"user {number}" for number in range(30)]
        answers = [client.post("/v1/completions", json=ASK | {"user": user}).json() for user in users]
        assert {answer["system_fingerprint"] for answer in answers} == {"assistant@1"}
        assert 'moestro_gateway_rollbacks_total{model="assistant"} 1.0' in client.get("/metrics").text


class Heard:
    """A `Watch` that keeps what it hears."""

    def __init__(self, *, streams: bool = False) -> None:
        self.streams = streams
        self.rollbacks: Counter[str] = Counter()
        self.seen: Counter[tuple[str, str, bool]] = Counter()

    def answered(
        self, name: str, version: str, *, caller: str, failed: bool, streamed: bool, seconds: float | None
    ) -> None:
        assert caller == "local"
        assert streamed is self.streams
        assert failed or seconds is not None
        self.seen[name, version, failed] += 1


def test_what_a_lost_process_leaves_unanswered_is_its_failure_and_a_4xx_nobodys(
    tmp_path: Path, fleet: Fleet, models: Any
) -> None:
    heard: Any = Heard()
    server = models.servers["1"]
    parts = Parts(home=Home(tmp_path), fleet=fleet, watch=heard)
    with serving(create_app(parts), listen("127.0.0.1", 0)) as url, httpx.Client(base_url=url) as client:
        assert client.post("/v1/completions", json=ASK).status_code == 200
        assert client.post("/v1/chat/completions", json=ASK).status_code == 400
        assert client.post("/v1/completions", json=ASK | {"model": "nothing"}).status_code == 404
        server.may_start.clear()
        server.gone.set()
        assert fleet.wait_for(lambda fleet: not all(fleet.ready.values()), WAIT)
        assert client.post("/v1/completions", json=ASK | {"model": "assistant@1"}).status_code == 503
        server.may_start.set()
    assert heard.seen == {("assistant", "1", False): 1, ("assistant", "1", True): 1}


@pytest.mark.parametrize("when", ["begin", "end"])
@pytest.mark.parametrize(
    ("code", "failed"), [("400", None), ("422", None), ("500", True), ("503", True), ("null", True), ('"odd"', True)]
)
def test_an_error_within_a_stream_counts_as_one_outside(
    tmp_path: Path, fleet: Fleet, when: str, code: str, failed: bool | None
) -> None:
    heard: Any = Heard(streams=True)
    parts = Parts(home=Home(tmp_path), fleet=fleet, watch=heard)
    with serving(create_app(parts), listen("127.0.0.1", 0)) as url:
        answer = httpx.post(url + "/v1/completions", json=ASK | {"stream": True, "prompt": f"{when} {code}"})
    assert (answer.status_code, b'"error"' in answer.content) == (200, True)
    assert heard.seen == ({} if failed is None else {("assistant", "1", failed): 1})
