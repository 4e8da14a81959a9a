"""A new champion that fails is taken back by the assembled gateway: its watch, the real registry, the fleet."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from moestro_services.gateway.listening import listen, serving
from moestro_services.gateway.watch import RollbackRule

REGISTER = "/api/models/assistant/versions"
ASK = {"model": "assistant", "prompt": "1 + 1 =", "max_tokens": 2}


class Failing:
    """Healthy, and answers nothing but 500."""

    url = ""
    api_key = ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await Response(status_code=200 if scope["path"] == "/health" else 500)(scope, receive, send)


@pytest.fixture
def api(api: Any, fixed_server: Any) -> Iterator[Any]:
    failing = Failing()
    with serving(failing, listen("127.0.0.1", 0)) as failing.url:
        api.servers["2"] = fixed_server(failing)
        yield api


@pytest.fixture
def rule() -> RollbackRule:
    return RollbackRule(min_requests=20)


def test_a_champion_that_fails_is_taken_back(
    api: Any, bearing: Callable[[str], httpx.Client], deployed: Callable[..., str]
) -> None:
    admin, infer = bearing("admin"), bearing("infer")
    for letter in "ab":
        assert admin.post(REGISTER, json={"deployment": deployed(letter)}).status_code == 201
    api.wait_for({"1": "serving", "2": "serving"})
    before = [client.post("/v1/completions", json=ASK).status_code for client in (admin, infer) * 15]
    assert set(before) == {200}
    assert admin.post("/api/models/assistant/promote", json={}).json()["aliases"]["champion"] == "2"
    assert api.fleet.wait_for(lambda fleet: fleet.target("assistant", "").version.version == "2", 30)
    found, deadline = [500], time.monotonic() + 60
    while found[-1] != 200 and time.monotonic() < deadline:
        found += [client.post("/v1/completions", json=ASK).status_code for client in (infer, admin)]
    assert set(found) == {200, 500}
    assert api.models.model("assistant").aliases == {"champion": "1", "previous": "2"}
    newest = api.audit[0]
    assert (newest.action, newest.target, newest.actor) == ("rollback", "assistant", "gateway")
    assert "requests to version 2 failed" in newest.details["reason"]
    assert 'moestro_gateway_rollbacks_total{model="assistant"} 1.0' in admin.get("/metrics").text
