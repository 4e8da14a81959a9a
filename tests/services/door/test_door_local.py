"""The door without keys, on loopback: for programs and pages of this machine alone."""

import asyncio
from typing import Any

import pytest
from starlette.types import Message, Receive, Send
from starlette.types import Scope as AsgiScope

from moestro_services.gateway.caller import Scope
from moestro_services.gateway.door import Door
from moestro_services.gateway.limits import Limits

Gateway = Any
"""`conftest.Gateway`."""


@pytest.mark.parametrize(
    ("host", "wanted"),
    [
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("127.0.0.1:8000", 200),
        ("127.9.9.9", 200),
        ("[::1]", 200),
        ("[::1]:80", 200),
        ("evil.example", 400),
        ("evil.example:8000", 400),
        ("localhost.evil.example", 400),
        ("localhost:80.evil.example", 400),
        ("evil.example@localhost", 400),
        ("127.0.0.1.evil.example", 400),
        ("0.0.0.0", 400),
        ("[::1", 400),
        ("::1", 400),
        ("", 400),
        ("localhost\r\nHost: evil.example", 400),
        ("localhost\r\nHost: localhost", 400),
    ],
)
def test_without_keys_the_host_must_be_this_machine(local: Gateway, host: str, wanted: int) -> None:
    assert local.status(f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()) == wanted
    assert local.status(b"GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n") == 200


@pytest.mark.parametrize(
    ("origin", "wanted"),
    [
        ("http://localhost:5000", 200),
        ("http://127.0.0.1", 200),
        ("https://evil.example", 403),
        ("http://localhost.evil.example", 403),
        ("http://localhost@evil.example", 403),
        ("null", 403),
        ("", 403),
        ("http://[", 403),
    ],
)
def test_without_keys_another_sites_page_changes_nothing(local: Gateway, origin: str, wanted: int) -> None:
    answer = local.ask("POST", "/api/promote", headers={"Origin": origin, "Content-Type": "text/plain"}, content="{}")
    assert answer.status_code == wanted
    assert local.ask("GET", "/api/runs", headers={"Origin": origin}).status_code == 200


def test_without_keys_everyone_here_may_do_all(local: Gateway) -> None:
    assert local.ask("POST", "/api/promote", headers={"Authorization": "Bearer none"}).status_code == 200
    assert local.inside.callers[0].id == "local"
    assert local.inside.callers[0].may(Scope.ADMIN)


def test_the_lifespan_passes() -> None:
    seen: list[str] = []

    async def app(scope: AsgiScope, _receive: Receive, _send: Send) -> None:
        seen.append(scope["type"])

    async def nothing() -> Message:
        return {"type": "lifespan.startup"}

    async def send(_message: Message) -> None:
        pass

    door = Door(app, keys=None, limits=Limits(), counted=lambda _: None)
    asyncio.run(door({"type": "lifespan"}, nothing, send))
    assert seen == ["lifespan"]
