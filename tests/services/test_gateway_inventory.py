"""/api over a home's records, and who may ask."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from moestro.errors import ArtifactError, BusyError, InputError, ResourceError
from moestro_flows.home import Home
from moestro_services.catalog import Catalog
from moestro_services.gateway.app import Parts, create_app
from moestro_services.gateway.caller import Scope
from moestro_services.gateway.door import Door
from moestro_services.gateway.fleet import Fleet
from moestro_services.gateway.keys import KeyRing
from moestro_services.gateway.launch import Address, ask, gateway
from moestro_services.gateway.limits import Limits
from moestro_services.gateway.listening import listen, serving
from moestro_services.gateway.replica import Backoff
from moestro_services.gateway.sources import Fixed, Registered, chosen


def app_of(home: Home, fleet: Fleet | None = None, keys: KeyRing | None = None) -> FastAPI:
    def door(app: Any, traffic: Any) -> Any:
        return Door(app, keys=keys, limits=Limits(), counted=traffic.refused)

    if fleet is None:
        fleet = Fleet(Registered(home, tuple).open)
        fleet.apply([])
    return create_app(Parts(home=home, fleet=fleet, wraps=(door,)))


@pytest.fixture
def client(built_home: Home) -> Iterator[TestClient]:
    with TestClient(app_of(built_home), base_url="http://127.0.0.1") as made:
        yield made


def test_runs_are_listed_and_found(client: TestClient, built_home: Home) -> None:
    listed = client.get("/api/runs").json()
    assert [run["id"] for run in listed] == ["20260102-030400-abcd"]
    assert listed[0]["steps"] == len(Catalog(built_home).run().steps)
    found = client.get("/api/runs/20260102").json()
    assert found["name"] == "small"
    assert found == client.get("/api/runs/latest").json()


def test_an_artifact_comes_with_its_lineage(client: TestClient) -> None:
    mixes = client.get("/api/artifacts", params={"stage": "mix"}).json()
    detail = client.get(f"/api/artifacts/{mixes[0]['fingerprint'][:10]}").json()
    assert detail["record"]["stage"] == "mix"
    assert detail["lineage"][0]["fingerprint"] == mixes[0]["fingerprint"]
    assert {item["stage"] for item in detail["lineage"]} == {"mix", "seed", "branch", "tokens", "corpus"}
    assert len({item["fingerprint"] for item in detail["lineage"]}) == len(detail["lineage"])
    assert {item["stage"] for item in detail["used_by"]} == {"tune", "evaluate", "profile"}


def test_experts_are_those_of_the_profile(client: TestClient) -> None:
    found = client.get("/api/experts/mix").json()
    assert found["domains"] == ["code", "prose"]
    assert (found["num_layers"], found["num_experts"], found["num_experts_per_tok"]) == (2, 3, 2)
    prose = next(expert for expert in found["experts"] if expert["origin"] == "prose")
    assert (prose["preferred"], prose["shares"]) == ("prose", {"code": 0.2, "prose": 0.8})


def test_deployments_say_which_are_served(built_home: Home, fixed_server: Any, client: TestClient) -> None:
    listed = client.get("/api/deployments").json()
    assert [(item["name"], item["state"]) for item in listed] == [("assistant", "not served")]
    source = Fixed(built_home, Catalog(built_home).entry("deploy").artifact)
    server = fixed_server(started=False)
    with Fleet(lambda version: (source.open(version)[0], server), backoff=Backoff(first=0.0)) as fleet:
        fleet.apply(source.read())
        with TestClient(app_of(built_home, fleet), base_url="http://127.0.0.1") as other:
            assert other.get("/api/deployments").json()[0]["state"] == "starting"
            server.may_start.set()
            assert fleet.wait_for(lambda fleet: all(fleet.ready.values()), 30)
            assert other.get("/api/deployments").json()[0]["state"] == "serving"
            assert other.get("/v1/models/assistant").json()["max_model_len"] == 512


@pytest.mark.parametrize(
    ("path", "status", "kind"),
    [
        ("/api/runs/nothing", 404, "InputError"),
        ("/api/artifacts/ffffffff", 404, "ArtifactError"),
        ("/api/artifacts/..%2F..", 400, "HTTPError"),
        ("/api/artifacts/..", 404, "HTTPError"),
        ("/api/experts/seed", 404, "ArtifactError"),
        ("/api/runs?limit=0", 400, "HTTPError"),
    ],
)
def test_mistakes_are_worded(client: TestClient, path: str, status: int, kind: str) -> None:
    response = client.get(path)
    assert (response.status_code, response.json()["error"]["kind"]) == (status, kind)


def test_folders_are_not_read_over_http(client: TestClient, built_home: Home) -> None:
    folder = Catalog(built_home).entry("mix").path
    assert client.get(f"/api/artifacts/{folder}").status_code == 400
    assert client.get(f"/api/artifacts{folder}").status_code == 404


def test_with_keys_only_probes_are_open(built_home: Home) -> None:
    keys = KeyRing.of(built_home)
    _, secret = keys.create("all", [Scope.ADMIN])
    with TestClient(app_of(built_home, keys=keys), base_url="http://moestro.example") as client:
        for path in ("/api/runs", "/v1/models", "/metrics", "/openapi.json"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"Authorization": f"Bearer {secret}x"}).status_code == 401
            assert client.get(path, headers={"Authorization": f"Bearer {secret}"}).status_code == 200
        assert client.get("/health").status_code == 200
        assert client.get("/ready").status_code == 200


def test_without_the_registry_artifacts_are_served_and_names_waited_for(
    built_home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert isinstance(chosen(built_home, ["deploy"]), Fixed)
    for names in ([], ["assistant"], ["assistant", "other"]):
        waiting = chosen(built_home, names)
        assert isinstance(waiting, Registered)
        with pytest.raises(ResourceError, match="cannot be reached"):
            waiting.read()


def test_a_deployments_parser_of_tool_calls_reaches_its_server(deploying: Any) -> None:
    for letter, parser in (("a", "hermes"), ("b", "")):
        source = Fixed(deploying.home, deploying(letter, **({"tool_call_parser": parser} if parser else {})))
        ((version,),) = (model.versions for model in source.read())
        _deployment, server = source.open(version)
        assert server.config.tool_call_parser == parser


def test_a_home_without_deployments_is_told_how_to_get_one(
    tmp_path: Path, prepare_mlflow: Callable[[Path], None]
) -> None:
    prepare_mlflow(tmp_path)
    with pytest.raises(InputError, match="Nothing is deployed in"):
        chosen(Home(tmp_path), ())
    with pytest.raises(ArtifactError, match="No artifact 'assistant'"):
        chosen(Home(tmp_path), ["assistant"])


def test_a_port_in_use_is_refused_before_vllm_starts(built_home: Home) -> None:
    artifact = Catalog(built_home).entry("deploy").artifact
    said: list[str] = []
    with listen("127.0.0.1", 0) as taken:
        opened = gateway(built_home, Fixed(built_home, artifact), Address(port=taken.getsockname()[1]), say=said.append)
        with pytest.raises(BusyError, match="in use"):
            opened.__enter__()
    assert said == []


def test_ask_returns_the_text(built_home: Home, fleet: Fleet) -> None:
    with serving(app_of(built_home, fleet), listen("127.0.0.1", 0)) as url:
        assert ask(url, "assistant", "12 + 7 =", 4) == " 19"
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


def test_a_deployment_without_its_checkpoint_is_lost_and_says_why(built_home: Home) -> None:
    artifact = Catalog(built_home).entry("deploy").artifact
    shutil.rmtree(Catalog(built_home).entry("compress").path)
    said: list[str] = []
    with gateway(built_home, Fixed(built_home, artifact), Address(), say=said.append) as running:
        with pytest.raises(ResourceError, match="is not in"):
            running.wait_for_first_starts()
        assert httpx.get(running.url + "/ready").status_code == 503
        assert httpx.get(running.url + "/health").status_code == 200
    assert any("assistant@0 is lost" in line for line in said)
