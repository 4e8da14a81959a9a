"""A real lifecycle over the API: a Prefect flow run that is started, followed, left and followed again, and stopped."""

import json
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from moestro.errors import MoestroError
from moestro_flows.home import Home
from moestro_services.gateway.caller import CALLER, LOCAL
from moestro_services.gateway.errors import api_error
from moestro_services.gateway.lifecycles import lifecycles
from moestro_services.gateway.listening import listen, serving
from moestro_services.gateway.management_parts import ManagementParts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SHORT = {"tune": None, "rl": None, "compress": None, "deploy": None, "evaluate.task": None} | {
    "seed.training.steps": 5,
    "branch.training.steps": 5,
}
LONG = SHORT | {"seed.training.steps": 1_000_000}


class Noted:
    """An audit log in memory."""

    def __init__(self) -> None:
        self.actions: list[str] = []

    def write(self, actor: str, action: str, target: str, **details: Any) -> None:
        self.actions.append(f"{actor} {action} {details.get('config', target)}")

    def read(self, limit: int) -> list[Any]:
        return self.actions[:limit]


class Everyone:
    """Lets everybody in."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[CALLER] = LOCAL
        await self.app(scope, receive, send)


@pytest.fixture
def audit() -> Noted:
    return Noted()


@pytest.fixture
def client(tmp_path: Path, audit: Noted, moestro: Any) -> Iterator[httpx.Client]:
    """A client of the API over a home that holds the tiny config."""
    home = Home(tmp_path / "home")
    home.prepare()
    home.configs.mkdir()
    shutil.copy(moestro.config, home.configs / "tiny.yaml")
    nothing: Any = None
    app = FastAPI()
    app.include_router(
        lifecycles(ManagementParts(home=home, fleet=nothing, models=nothing, promotions=nothing, audit=audit))
    )
    app.add_middleware(Everyone)

    @app.exception_handler(MoestroError)
    async def mistake(_request: Request, error: MoestroError) -> JSONResponse:
        return api_error(error)

    with (
        serving(app, listen("127.0.0.1", 0)) as url,
        httpx.Client(base_url=url, timeout=120, trust_env=False) as made,
    ):
        yield made
        for one in made.get("/api/lifecycles").json():
            made.delete(f"/api/lifecycles/{one['id']}")
            made.get(f"/api/lifecycles/{one['id']}/events")


def events(client: httpx.Client, identity: str, after: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Ids and contents of a lifecycle's events."""
    headers = {"Last-Event-ID": after} if after else {}
    with client.stream("GET", f"/api/lifecycles/{identity}/events", headers=headers) as answer:
        name = ""
        for line in answer.iter_lines():
            if line.startswith("id: "):
                name = line.removeprefix("id: ")
            if line.startswith("data: "):
                yield name, json.loads(line.removeprefix("data: "))


def test_a_lifecycle_is_started_followed_and_stopped(client: httpx.Client, audit: Noted, tmp_path: Path) -> None:
    started = client.post("/api/lifecycles", json={"config": "tiny", "changes": SHORT})
    assert started.status_code == 202, started.text
    identity = started.json()["id"]
    seen = []
    for name, event in events(client, identity):
        seen.append((name, event))
        if event["event"] == "ended":
            break  # the connection is lost
    rest = list(events(client, identity, after=seen[-1][0]))
    assert rest[-1][0] == "end"
    last = rest[-1][1]["lifecycle"]
    assert (last["state"], last["error"]) == ("completed", None)
    assert seen + rest == list(events(client, identity))
    steps = seen[0][1]["steps"]
    assert {event["step"] for _, event in seen + rest if event["event"] == "ended"} == set(steps)
    assert {step["status"] for step in last["steps"]} == {"completed"}
    assert client.post("/api/lifecycles", json={"config": "tiny", "changes": LONG}).status_code == 202

    (running, _) = client.get("/api/lifecycles").json()
    for _, event in events(client, running["id"]):
        if event["event"] == "progress" and event["step"] == "seed":
            break
    assert client.post("/api/lifecycles", json={"config": "tiny"}).status_code == 409
    assert client.delete(f"/api/lifecycles/{running['id']}").json()["state"] == "stopping"
    *_, (_, finished) = events(client, running["id"])
    assert finished["lifecycle"]["state"] == "cancelled"
    started_twice = ["local lifecycle.start tiny"] * 2
    assert audit.actions == [*started_twice, f"local lifecycle.stop {running['id']}"]

    with sqlite3.connect(tmp_path / "home" / "prefect" / "prefect.db") as database:
        flow_runs = database.execute("select name, state_type from flow_run order by created").fetchall()
    assert [name for name, _ in flow_runs] == ["tiny", "tiny"]
    assert flow_runs[0][1] == "COMPLETED"
