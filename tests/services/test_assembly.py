"""The whole gateway of a home, before processes that are not ones: what its parts make together."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from moestro.errors import ResourceError
from moestro.registry.model_versions import RegisteredModel
from moestro_flows.home import Home
from moestro_services.gateway.assembly import Policy, assembled
from moestro_services.gateway.caller import Scope
from moestro_services.gateway.expert_metrics_sampling import Sampling
from moestro_services.gateway.fleet import Fleet
from moestro_services.gateway.keys import KeyRing
from moestro_services.gateway.launch import Address, gateway
from moestro_services.gateway.limits import Limits
from moestro_services.gateway.steering import Steering

ASK: dict[str, Any] = {"model": "assistant", "prompt": "12 + 7 =", "max_tokens": 4}
WAIT = 30


class FixedSource:
    """What is served is a list."""

    def __init__(self, home: Home, models: Any) -> None:
        self.steering = Steering(home.store)
        self.open = models.open
        self._served = models.model(champion="1")

    def read(self) -> Sequence[RegisteredModel]:
        return [self._served]


class LateSource(FixedSource):
    """A registry that cannot be read at first."""

    away = True

    def read(self) -> Sequence[RegisteredModel]:
        if self.away:
            raise ResourceError("MLflow is away.")
        return super().read()


class Whole:
    """A gateway that asks for keys, one of each scope."""

    def __init__(self, home: Home, url: str, ring: KeyRing, fleet: Fleet) -> None:
        self.home = home
        self.fleet = fleet
        limits = Limits(concurrent_requests=2)
        self.secrets = {scope: ring.create(scope.value, [scope], limits)[1] for scope in Scope}
        self.clients = {
            scope: httpx.Client(base_url=url, headers={"Authorization": f"Bearer {secret}"}, timeout=WAIT)
            for scope, secret in self.secrets.items()
        }

    def ask(self, scope: Scope = Scope.INFER, **fields: Any) -> httpx.Response:
        return self.clients[scope].post("/v1/completions", json=ASK | fields)


@pytest.fixture
def whole(tmp_path: Path, models: Any) -> Iterator[Whole]:
    home = Home(tmp_path)
    ring = KeyRing.of(home)
    ring.create("first", [Scope.INFER])
    policy = Policy(keys=ring, sampling=Sampling(share=1.0))
    with gateway(home, FixedSource(home, models), Address(), say=lambda _: None, policy=policy) as running:
        running.wait_until_ready()
        made = Whole(home, running.url, ring, running.fleet)
        yield made
        for client in made.clients.values():
            client.close()


def test_models_are_taken_up_once_the_registry_answers(
    tmp_path: Path, models: Any, caplog: pytest.LogCaptureFixture
) -> None:
    home = Home(tmp_path)
    source = LateSource(home, models)
    with (
        gateway(home, source, Address(), say=lambda _: None) as running,
        httpx.Client(base_url=running.url, timeout=WAIT) as client,
    ):
        for refused in (client.post("/v1/completions", json=ASK), client.get("/v1/models")):
            assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
            assert "registry did not answer" in refused.json()["error"]["message"]
        assert (client.get("/ready").status_code, client.get("/ready").json()["ready"]) == (503, False)
        assert client.get("/health").status_code == 200
        assert "moestro_registry_up 0.0" in client.get("/metrics").text
        assert "no model is served until it can: MLflow is away." in caplog.text

        source.away = False
        running.fleet.kick()
        running.wait_until_ready()
        assert client.post("/v1/completions", json=ASK).status_code == 200
        assert client.get("/ready").status_code == 200
        assert "moestro_registry_up 1.0" in client.get("/metrics").text
        assert "can be read again" in caplog.text


def test_the_description_is_complete(tmp_path: Path, models: Any) -> None:
    home = Home(tmp_path)
    with (
        Fleet(models.open) as fleet,
        assembled(home, fleet, Policy(keys=None), Steering(home.store)) as made,
    ):
        document = made.described()
    operations = [operation for methods in document["paths"].values() for operation in methods.values()]
    names = [operation["operationId"] for operation in operations]
    assert len(set(names)) == len(names)
    assert all(len(name) < 30 for name in names)  # none that FastAPI made up
    known = {tag["name"] for tag in document["tags"]}
    assert all(operation["tags"] and known.issuperset(operation["tags"]) for operation in operations)
    assert {"/v1/completions", "/api/models/{name}/promote", "/api/lifecycles/{id}/events", "/ready"} <= {
        *document["paths"]
    }


@pytest.mark.parametrize(
    "fields",
    [
        {"steering_profile": "german"},
        {"vllm_xargs": {"moestro_profile": "f" * 64}},
        {"vllm_xargs": {"moestro_anything": 1}},
        {"cache_salt": "moestro-steering:" + "f" * 64 + ":"},
    ],
)
def test_steering_cannot_be_forged(whole: Whole, upstream: Any, fields: dict[str, Any]) -> None:
    assert whole.ask(**fields).status_code in {400, 403}
    assert upstream.seen == []
    assert [state.in_flight for state in whole.fleet.replicas()] == [0]


def test_refusals_and_clients_that_leave_take_no_places(whole: Whole, upstream: Any) -> None:
    infer = whole.clients[Scope.INFER]
    for _ in range(3):
        assert whole.ask(steering_profile="german").status_code == 403
        assert infer.post("/v1/completions", content=b"{").status_code == 400
        assert whole.ask(model="nothing").status_code == 404
        assert infer.post("/v1/completions", json=ASK | {"prompt": "fail"}).status_code == 500
        upstream.left.clear()
        with infer.stream("POST", "/v1/completions", json=ASK | {"prompt": "endless", "stream": True}) as answer:
            assert next(answer.iter_bytes())
        assert upstream.left.wait(WAIT)
    assert whole.ask().status_code == 200


def test_no_secret_is_told_anywhere(whole: Whole, upstream: Any) -> None:
    admin = whole.clients[Scope.ADMIN]
    assert whole.ask(Scope.ADMIN).status_code == 200
    wrong = httpx.get(admin.base_url.join("/api/models"), headers={"Authorization": "Bearer mk-" + "x" * 43})
    assert wrong.status_code == 401
    admin.post("/api/models/assistant/promote", json={"force": whole.secrets[Scope.INFER]})
    told = [admin.get(path).text for path in ("/metrics", "/ready", "/api/audit", "/api/models", "/v1/models")]
    path, headers, body = upstream.seen[0]
    told += [path, body.decode(), json.dumps({**headers, "authorization": ""})]
    files = [file for file in whole.home.path.rglob("*") if file.is_file()]
    told += [file.read_bytes().decode(errors="replace") for file in files]
    assert any("x-request-id" in text for text in told)
    for secret in (*whole.secrets.values(), upstream.api_key, "mk-" + "x" * 43):
        assert not [text[:200] for text in told if secret in text]


def test_scopes_hold_for_the_whole(whole: Whole) -> None:
    read, infer = whole.clients[Scope.READ], whole.clients[Scope.INFER]
    assert whole.ask(Scope.READ).status_code == 403
    assert read.get("/api/models").status_code == 200
    assert read.get("/api/audit").status_code == 403
    assert read.post("/api/models/assistant/rollback").status_code == 403
    assert infer.get("/api/models").status_code == 403
    assert infer.get("/metrics").status_code == 403
    assert infer.get("/openapi.json").status_code == 200
    assert httpx.get(infer.base_url.join("/openapi.json")).status_code == 401
