"""Paths, headers and methods at the door: what two servers, or a router and the door, could read differently."""

from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.routing import Match
from starlette.types import Scope as AsgiScope

from moestro_services.gateway.access import RefusedError, needed, routed_path
from moestro_services.gateway.caller import Scope

Gateway = Any
"""`conftest.Gateway`."""
PATH_TRICKS = [
    "//api/runs",
    "/api//runs",
    "/v1/../api/promote",
    "/v1/..%2fapi/promote",
    "/v1/%2e%2e/api/promote",
    "/v1%2f..%2f..%2fapi%2fpromote",
    "/./api/runs",
    "/health/../api/promote",
    "/health%2f..%2fapi",
    "/api/runs/..",
    "/v1\\..\\api",
    "/v1/%00",
    "/v1/%0d%0aX:1",
    "/v1/%5c..%5capi",
]


@pytest.mark.parametrize("path", PATH_TRICKS)
def test_a_path_that_is_not_plain_is_no_path(gateway: Gateway, path: str) -> None:
    admin = gateway.key(Scope.ADMIN)["Authorization"]
    for authorization in ("", f"Authorization: {admin}\r\n"):
        assert gateway.status(f"POST {path} HTTP/1.1\r\nHost: a\r\n{authorization}\r\n".encode()) == 400
    assert gateway.inside.paths == []


@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        ("/health?x=/api", 200),
        ("/health#x", 200),
        ("/he%61lth", 200),
        ("/%61pi/runs", 401),
        ("/api%2fruns", 401),
        ("/api?/health", 401),
        ("/api;/health", 401),
        ("/health;x", 401),
        ("/health%20", 401),
        ("/health%3f", 401),
        ("http://a/api/runs", 401),
        ("http://a/health", 200),
        ("*", 400),
        ("/\xff", 400),
        ("/%ff%fe", 401),
        ("health", 400),
    ],
)
def test_scopes_are_those_of_the_decoded_path(gateway: Gateway, target: str, wanted: int) -> None:
    method = "OPTIONS" if target == "*" else "GET"
    assert gateway.status(f"{method} {target} HTTP/1.1\r\nHost: a\r\n\r\n".encode("latin-1")) == wanted


def nothing() -> None:
    """A route's end."""


@settings(max_examples=300, deadline=None)
@given(path=st.lists(st.sampled_from(["/", ".", "..", "v1", "api", "health", "%", "x", "\\", ";"]), max_size=8))
def test_no_path_passes_for_another_in_a_real_router(path: list[str]) -> None:
    """What the router gives to a route under /api, the door has taken for something under /api."""
    app = FastAPI(openapi_url=None)
    for prefix in ("/v1", "/api", "/health"):
        app.add_api_route(prefix + "{rest:path}", nothing, methods=["POST"], name=prefix)
    scope: AsgiScope = {"type": "http", "method": "POST", "path": "/" + "".join(path), "headers": [], "root_path": ""}
    try:
        need = needed("POST", routed_path(scope))
    except RefusedError:
        return
    reached = [route.name for route in app.router.routes if route.matches(scope)[0] is Match.FULL]
    rest = routed_path(scope).removeprefix("/api")
    if "/api" in reached and (not rest or rest.startswith("/")):
        assert need is Scope.ADMIN
    if need is Scope.INFER:
        assert reached == ["/v1"]


def test_a_root_path_hides_nothing() -> None:
    scope: AsgiScope = {"type": "http", "path": "/moestro/api/promote", "root_path": "/moestro"}
    assert needed("POST", routed_path(scope)) is Scope.ADMIN
    assert needed("POST", routed_path({**scope, "root_path": "/moe"})) != Scope.ADMIN


BODY = b"0\r\n\r\n"
HEAD_TRICKS = [
    b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
    b"Transfer-Encoding: gzip, chunked\r\n",
    b"Transfer-Encoding: chunked, chunked\r\n",
    b"Transfer-Encoding: identity\r\n",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
    b"Transfer-Encoding : chunked\r\n",
    b"Content-Length: -1\r\n",
    b"Content-Length: +5\r\n",
    b"Content-Length: 5, 5\r\n",
    b"Content-Length: 5\r\nContent-Length: 5\r\n",
    b"Content-Length: 5\r\nContent-Length: 6\r\n",
    b"Content-Length: 0x5\r\n",
    b"Content-Length: 99999999999999999999999999\r\n",
    b"Content-Length: \r\n",
    b"Host: b\r\n",
    b"Authorization: Bearer x\r\n",
    b"X: a\x00b\r\n",
    b"X\xff: a\r\n",
    b": a\r\n",
    b"no colon\r\n",
]


@pytest.mark.parametrize("trick", HEAD_TRICKS, ids=range(len(HEAD_TRICKS)))
def test_headers_that_two_servers_could_read_differently_are_a_400(gateway: Gateway, trick: bytes) -> None:
    key = gateway.key(Scope.ADMIN)["Authorization"].encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: %s\r\n%s\r\n" % (key, trick)
    assert gateway.status(head + BODY) == 400
    assert gateway.inside.paths == []
    assert gateway.in_flight() == 0


def test_other_headers_may_hold_any_bytes(gateway: Gateway) -> None:
    key = gateway.key(Scope.INFER)["Authorization"].encode()
    head = b"GET /v1/models HTTP/1.1\r\nHost: \xe9\r\nX-Note: \xff\xfe\r\nAuthorization:   %s  \r\n\r\n" % key
    assert gateway.status(head) == 200


@pytest.mark.parametrize("smuggled", [b"GET", b"G\xc9T", b"get", b"TRACE", b"CONNECT", b"PROPFIND", b"X" * 50])
def test_no_other_method_reads(gateway: Gateway, smuggled: bytes) -> None:
    key = gateway.key(Scope.READ)["Authorization"].encode()
    told = gateway.status(b"%s /api/runs HTTP/1.1\r\nHost: a\r\nAuthorization: %s\r\n\r\n" % (smuggled, key))
    assert told == 200 if smuggled == b"GET" else told in (400, 403)


def test_a_websocket_is_refused(gateway: Gateway) -> None:
    key = gateway.key(Scope.ADMIN)["Authorization"]
    head = (
        f"GET /api/runs HTTP/1.1\r\nHost: a\r\nAuthorization: {key}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    assert gateway.status(head.encode()) == 403
    assert gateway.counted == {"malformed": 1}
