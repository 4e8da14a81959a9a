"""The door before a real HTTP server, spoken to in raw bytes: who is let in, what is refused, that places are freed.

The application behind it tells what it was given; the path's end says how it behaves.
"""

import asyncio
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import openai
import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.routing import Match
from starlette.types import Message, Receive, Send
from starlette.types import Scope as AsgiScope

from moestro_services.gateway.access import RefusedError, needed, routed_path
from moestro_services.gateway.caller import Caller, Scope, caller_of
from moestro_services.gateway.door import LINGER_SECONDS, SPEND, Door
from moestro_services.gateway.keys import KeyRing
from moestro_services.gateway.limits import Limits
from moestro_services.gateway.listening import listen, serving

UNKNOWN = "mk-" + "x" * 43
SMALL = Limits(max_body_bytes=10_000, body_seconds=0.4, request_seconds=1.0)


class Inside:
    """The application behind the door."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.callers: list[Caller] = []
        self.spend: list[Callable[[int], None]] = []
        self.began = threading.Semaphore(0)
        self.left = threading.Event()
        self.release = asyncio.Event()
        self.loop: asyncio.AbstractEventLoop | None = None

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path = scope["path"]
        self.paths.append(path)
        self.callers.append(caller_of(scope))
        self.spend.append(scope.get(SPEND, lambda _: None))
        body = await read(receive)
        if path.endswith("fail"):
            raise ValueError("a fault of the application")
        if path.endswith("late"):
            raise TimeoutError("the application's own")
        if path.endswith("wait"):
            await self._wait(receive)
        answer = json.dumps({"bytes": len(body)}).encode()
        length = [] if path.endswith("stream") else [(b"content-length", str(len(answer)).encode())]
        headers = [(b"content-type", b"application/json"), *length]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if path.endswith("stream"):
            await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
            await self._wait(receive)
        await send({"type": "http.response.body", "body": answer})

    async def _wait(self, receive: Receive) -> None:
        self.loop = asyncio.get_running_loop()
        self.began.release()
        gone, freed = asyncio.ensure_future(receive()), asyncio.ensure_future(self.release.wait())
        try:
            await asyncio.wait({gone, freed}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            freed.cancel()
            self.left.set()

    def let_go(self) -> None:
        assert self.loop is not None
        self.loop.call_soon_threadsafe(self.release.set)


async def read(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


class Gateway:
    """A served door."""

    def __init__(self, folder: Path, limits: Limits, *, keys: bool = True) -> None:
        self.inside = Inside()
        self.counted: Counter[str] = Counter()
        self.keys = KeyRing(folder / "keys" / "keys.json")
        self.door = Door(
            self.inside, keys=self.keys if keys else None, limits=limits, counted=lambda why: self.counted.update([why])
        )
        self.url = ""

    @contextmanager
    def served(self) -> Iterator["Gateway"]:
        with serving(self.door, listen("127.0.0.1", 0)) as self.url:
            yield self

    def key(self, *scopes: Scope, name: str = "k", limits: Limits | None = None) -> dict[str, str]:
        """The header of a new key."""
        secret = self.keys.create(f"{name}{len(self.keys.list())}", scopes, limits)[1]
        return {"Authorization": f"Bearer {secret}"}

    def ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        return httpx.request(method, self.url + path, timeout=20, trust_env=False, **more)

    def raw(self, request: bytes, *, more: bytes = b"") -> bytes:
        """What comes back for these bytes until the server closes or falls silent for a while."""
        with closing(self.connect()) as client:
            client.sendall(request)
            if more:
                client.sendall(more)
            return everything(client)

    def connect(self) -> socket.socket:
        host, port = self.url.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=10)

    def in_flight(self) -> int:
        return sum(meter.in_flight for meter in self.door.meters._meters.values())


def everything(client: socket.socket) -> bytes:
    """All of one answer with a Content-Length, or all until the server closes."""
    got = b""
    while True:
        try:
            part = client.recv(65536)
        except ConnectionResetError:
            return got
        got += part
        head, found, body = got.partition(b"\r\n\r\n")
        length = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
        if not part or (found and length and len(body) >= int(length[0])):
            return got


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer else 0


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    with Gateway(tmp_path, Limits(max_body_bytes=10_000)).served() as made:
        yield made


@pytest.fixture
def hasty(tmp_path: Path) -> Iterator[Gateway]:
    with Gateway(tmp_path, SMALL).served() as made:
        yield made


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Gateway]:
    with Gateway(tmp_path, Limits(), keys=False).served() as made:
        yield made


ALLOWED = [
    ("GET", "/v1/models", {Scope.INFER}),
    ("POST", "/v1/completions", {Scope.INFER}),
    ("GET", "/v1", {Scope.INFER}),
    ("GET", "/api/runs", {Scope.READ}),
    ("HEAD", "/api", {Scope.READ}),
    ("GET", "/metrics", {Scope.READ}),
    ("POST", "/api/promote", set()),
    ("DELETE", "/api/deployments/1", set()),
    ("PUT", "/api/runs", set()),
    ("OPTIONS", "/api/runs", set()),
    ("GET", "/openapi.json", {Scope.READ, Scope.INFER}),
    ("POST", "/health", {Scope.READ, Scope.INFER}),
    ("GET", "/health/", {Scope.READ, Scope.INFER}),
    ("GET", "/", {Scope.READ, Scope.INFER}),
    ("GET", "/v1x", {Scope.READ, Scope.INFER}),
    ("GET", "/apis", {Scope.READ, Scope.INFER}),
    ("GET", "/API/runs", {Scope.READ, Scope.INFER}),
]


@pytest.mark.parametrize(("method", "path", "scopes"), ALLOWED)
def test_a_key_opens_what_its_scopes_say(gateway: Gateway, method: str, path: str, scopes: set[Scope]) -> None:
    for scope in Scope:
        answer = gateway.ask(method, path, headers=gateway.key(scope))
        wanted = 200 if scope in scopes | {Scope.ADMIN} else 403
        assert answer.status_code == wanted, (scope, answer.text)
    assert gateway.ask(method, path).status_code == 401
    assert gateway.inside.paths == [path] * (len(scopes) + 1)
    assert gateway.counted["scope"] == 2 - len(scopes)
    assert gateway.counted["no_key"] == 1


def test_probes_need_no_key(gateway: Gateway) -> None:
    for path in ("/health", "/ready"):
        assert gateway.ask("GET", path).status_code == 200
        assert gateway.ask("HEAD", path).status_code == 200
    assert gateway.inside.callers[0].scopes == frozenset()


def test_the_application_learns_who_asks(gateway: Gateway) -> None:
    headers = gateway.key(Scope.INFER, name="ci")
    gateway.ask("GET", "/v1/models", headers=headers)
    key = gateway.keys.list()[0]
    assert gateway.inside.callers == [Caller(key.id, key.scopes)]


WRONG = [
    "",
    "Bearer",
    "Basic abc",
    f"Bearer {UNKNOWN}",
    f"Bearer {UNKNOWN}, Bearer {UNKNOWN}",
    f"Bearer {UNKNOWN} {UNKNOWN}",
    f"bearer\t{UNKNOWN}",
    "Bearer " + "x" * 60_000,
    UNKNOWN,
]


@pytest.mark.parametrize("value", WRONG, ids=range(len(WRONG)))
def test_a_wrong_key_is_a_401_in_the_words_of_the_api(gateway: Gateway, value: str) -> None:
    gateway.key(Scope.ADMIN)
    answer = gateway.ask("POST", "/v1/completions", headers={"Authorization": value}, json={})
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert gateway.ask("GET", "/api/runs", headers={"Authorization": value}).json()["error"]["kind"]
    assert gateway.counted["wrong_key"] == 2
    assert gateway.inside.paths == []


def test_keys_take_effect_and_lose_it_while_the_gateway_runs(gateway: Gateway) -> None:
    client = openai.OpenAI(base_url=gateway.url + "/v1", api_key=UNKNOWN, max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="Incorrect API key"):
        client.models.list()
    key, secret = KeyRing(gateway.keys.path).create("late", [Scope.INFER])
    headers = {"Authorization": f"Bearer {secret}"}
    assert gateway.ask("GET", "/v1/models", headers=headers).status_code == 200
    KeyRing(gateway.keys.path).revoke(key.id)
    refused = gateway.ask("GET", "/v1/models", headers=headers)
    assert refused.status_code == 401
    assert "revoked" in refused.json()["error"]["message"]
    assert gateway.counted == {"wrong_key": 1, "revoked_key": 1}


def test_a_damaged_key_file_lets_nobody_in_and_heals(gateway: Gateway) -> None:
    headers = gateway.key(Scope.READ)
    content = gateway.keys.path.read_bytes()
    assert gateway.ask("GET", "/api/runs", headers=headers).status_code == 200
    gateway.keys.path.write_bytes(content[:-5])
    refused = gateway.ask("GET", "/api/runs", headers=headers)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    assert str(gateway.keys.path) not in refused.text
    gateway.keys.path.write_bytes(content)
    assert gateway.ask("GET", "/api/runs", headers=headers).status_code == 200


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
        answer = gateway.raw(f"POST {path} HTTP/1.1\r\nHost: a\r\n{authorization}\r\n".encode())
        assert status(answer) == 400
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
    assert status(gateway.raw(f"{method} {target} HTTP/1.1\r\nHost: a\r\n\r\n".encode("latin-1"))) == wanted


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
    assert status(gateway.raw(head + BODY)) == 400
    assert gateway.inside.paths == []
    assert gateway.in_flight() == 0


def test_other_headers_may_hold_any_bytes(gateway: Gateway) -> None:
    key = gateway.key(Scope.INFER)["Authorization"].encode()
    head = b"GET /v1/models HTTP/1.1\r\nHost: \xe9\r\nX-Note: \xff\xfe\r\nAuthorization:   %s  \r\n\r\n" % key
    assert status(gateway.raw(head)) == 200


@pytest.mark.parametrize("smuggled", [b"GET", b"G\xc9T", b"get", b"TRACE", b"CONNECT", b"PROPFIND", b"X" * 50])
def test_no_other_method_reads(gateway: Gateway, smuggled: bytes) -> None:
    key = gateway.key(Scope.READ)["Authorization"].encode()
    answer = gateway.raw(b"%s /api/runs HTTP/1.1\r\nHost: a\r\nAuthorization: %s\r\n\r\n" % (smuggled, key))
    assert status(answer) == 200 if smuggled == b"GET" else status(answer) in (400, 403)


def test_a_websocket_is_refused(gateway: Gateway) -> None:
    key = gateway.key(Scope.ADMIN)["Authorization"]
    head = (
        f"GET /api/runs HTTP/1.1\r\nHost: a\r\nAuthorization: {key}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    assert status(gateway.raw(head.encode())) == 403
    assert gateway.counted == {"malformed": 1}


@pytest.mark.parametrize("size", [10_001, 200_000, 30_000_000])
def test_a_large_body_is_a_413_that_its_sender_comes_to_read(gateway: Gateway, size: int) -> None:
    def chunks() -> Iterator[bytes]:
        for start in range(0, size, 65536):
            yield b" " * min(65536, size - start)

    headers = gateway.key(Scope.INFER)
    for content in (b" " * size, chunks()):
        answer = gateway.ask("POST", "/v1/completions", headers=headers, content=content)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"
        assert "10000 bytes" in answer.json()["error"]["message"]
    assert gateway.inside.paths == []
    assert gateway.counted == {"max_body_bytes": 2}
    assert gateway.in_flight() == 0


def test_a_body_of_the_largest_size_passes_whole(gateway: Gateway) -> None:
    headers = gateway.key(Scope.INFER)
    for content in (b"x" * 10_000, iter([b"x" * 2500] * 4), iter([b"x"] * 300)):
        wanted = 300 if not isinstance(content, bytes) and gateway.inside.paths[1:] else 10_000
        answer = gateway.ask("POST", "/v1/completions", headers=headers, content=content)
        assert answer.json() == {"bytes": wanted}


def test_who_asks_before_sending_is_told_without_sending(gateway: Gateway) -> None:
    key = gateway.key(Scope.INFER)["Authorization"]
    head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\n%sContent-Length: %d\r\nExpect: 100-continue\r\n\r\n"
    began = time.monotonic()
    assert status(gateway.raw((head % (f"Authorization: {key}\r\n", 10_001)).encode())) == 413
    assert status(gateway.raw((head % ("", 10_001)).encode())) == 401
    assert time.monotonic() - began < LINGER_SECONDS
    with closing(gateway.connect()) as client:
        client.sendall((head % (f"Authorization: {key}\r\n", 3)).encode())
        assert client.recv(100).startswith(b"HTTP/1.1 100 ")
        client.sendall(b"abc")
        assert everything(client).endswith(b'{"bytes": 3}')


def test_a_slow_body_is_a_408(hasty: Gateway) -> None:
    key = hasty.key(Scope.INFER)["Authorization"]
    for framing in ("Content-Length: 5", "Transfer-Encoding: chunked"):
        head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: {key}\r\n{framing}\r\n\r\n"
        answer = hasty.raw(head.encode(), more=b"2\r\nab\r\n" if "chunked" in framing else b"ab")
        assert status(answer) == 408
        assert b"connection: close" in answer.lower()
    assert hasty.inside.paths == []
    assert hasty.counted == {"body_seconds": 2}
    assert hasty.in_flight() == 0


def test_a_request_that_takes_too_long_is_a_504_that_is_not_tried_again(hasty: Gateway) -> None:
    secret = hasty.key(Scope.INFER)["Authorization"].removeprefix("Bearer ")
    client = openai.OpenAI(base_url=hasty.url + "/v1", api_key=secret, max_retries=3)
    with pytest.raises(openai.InternalServerError, match="more than 1 s") as raised:
        client.get("/wait", cast_to=httpx.Response)
    assert raised.value.status_code == 504
    assert hasty.inside.paths == ["/v1/wait"]
    assert hasty.inside.left.wait(10)
    assert hasty.in_flight() == 0


def test_a_stream_that_takes_too_long_is_cut_off(hasty: Gateway) -> None:
    with httpx.stream("GET", hasty.url + "/v1/stream", headers=hasty.key(Scope.INFER), timeout=20) as answer:
        assert answer.status_code == 200
        arriving = answer.iter_bytes()
        assert next(arriving) == b"data: 1\n\n"
        with pytest.raises(httpx.RemoteProtocolError):
            next(arriving)
    assert hasty.inside.left.wait(10)
    assert hasty.counted == {"request_seconds": 1}
    assert hasty.in_flight() == 0


def test_an_application_of_task_groups_is_ended_in_time(tmp_path: Path) -> None:
    """As the proxy is one: a task waits for the client to leave while another asks the model's server."""
    ended: list[str] = []

    async def proxy(_scope: AsgiScope, receive: Receive, _send: Send) -> None:
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(receive)
                await anyio.sleep_forever()
        finally:
            ended.append("all of it")

    messages: list[Message] = []

    async def never() -> Message:
        return await asyncio.get_running_loop().create_future()

    async def send(message: Message) -> None:
        messages.append(message)

    door = Door(proxy, keys=None, limits=Limits(request_seconds=0.05), counted=lambda _: None)
    headers = [(b"host", b"localhost")]
    asyncio.run(door({"type": "http", "method": "POST", "path": "/v1/x", "headers": headers}, never, send))
    assert ended == ["all of it"]
    assert messages[0]["status"] == 504
    assert (b"x-should-retry", b"false") in messages[0]["headers"]


def test_events_of_the_management_api_may_last(hasty: Gateway) -> None:
    with httpx.stream("GET", hasty.url + "/api/stream", headers=hasty.key(Scope.READ), timeout=20) as answer:
        assert hasty.inside.began.acquire(timeout=10)
        assert not hasty.inside.left.wait(1.5)  # longer than a request may take until its answer begins
        hasty.inside.let_go()
        assert b"".join(answer.iter_bytes()).endswith(b'{"bytes": 0}')
    assert hasty.ask("GET", "/api/wait", headers=hasty.key(Scope.READ)).status_code == 200
    assert hasty.counted == {}


def test_faults_of_the_application_are_its_own_and_free_their_place(gateway: Gateway) -> None:
    headers = gateway.key(Scope.INFER, limits=Limits(concurrent_requests=1))
    for path in ("/v1/fail", "/v1/late", "/v1/fail"):
        assert gateway.ask("POST", path, headers=headers, json={}).status_code == 500
    assert gateway.counted == {}
    assert gateway.in_flight() == 0


def test_a_client_that_leaves_frees_its_place(gateway: Gateway) -> None:
    headers = gateway.key(Scope.INFER, limits=Limits(concurrent_requests=1))
    for path in ("/v1/wait", "/v1/stream"):
        gateway.inside.left.clear()
        with closing(gateway.connect()) as client:
            request = f"GET {path} HTTP/1.1\r\nHost: a\r\nAuthorization: {headers['Authorization']}\r\n\r\n"
            client.sendall(request.encode())
            assert gateway.inside.began.acquire(timeout=10)
            over = gateway.ask("GET", "/v1/models", headers=headers)
            assert (over.status_code, over.headers["retry-after"]) == (429, "1")
        assert gateway.inside.left.wait(10)
        assert eventually(lambda: gateway.ask("GET", "/v1/models", headers=headers).status_code == 200)
    assert gateway.counted["concurrent_requests"] >= 2


def test_a_client_that_leaves_its_body_unfinished_frees_its_place(gateway: Gateway) -> None:
    headers = gateway.key(Scope.INFER, limits=Limits(concurrent_requests=1))
    key = headers["Authorization"]
    with closing(gateway.connect()) as client:
        head = f"POST /v1/x HTTP/1.1\r\nHost: a\r\nAuthorization: {key}\r\nContent-Length: 9\r\n\r\nab"
        client.sendall(head.encode())
        assert eventually(lambda: gateway.in_flight() == 1)
    assert eventually(lambda: gateway.in_flight() == 0)
    assert gateway.inside.paths == []
    assert gateway.counted == {}


def eventually(holds: Callable[[], bool], seconds: float = 10) -> bool:
    waiting = threading.Event()
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        waiting.wait(0.01)
    return True


def test_limits_are_each_keys_own(gateway: Gateway) -> None:
    few = gateway.key(Scope.INFER, limits=Limits(requests_per_minute=2))
    many = gateway.key(Scope.INFER)
    assert [gateway.ask("GET", "/v1/models", headers=few).status_code for _ in range(4)] == [200, 200, 429, 429]
    assert gateway.ask("GET", "/v1/models", headers=many).status_code == 200
    over = gateway.ask("GET", "/v1/models", headers=few)
    assert 1 <= int(over.headers["retry-after"]) <= 30
    assert over.json()["error"]["code"] == "rate_limit_exceeded"
    secret = few["Authorization"].removeprefix("Bearer ")
    client = openai.OpenAI(base_url=gateway.url + "/v1", api_key=secret, max_retries=0)
    with pytest.raises(openai.RateLimitError, match="2 requests per minute"):
        client.models.list()


def test_tokens_are_charged_when_they_are_known(gateway: Gateway) -> None:
    headers = gateway.key(Scope.INFER, limits=Limits(tokens_per_minute=100))
    assert gateway.ask("POST", "/v1/completions", headers=headers, json={}).status_code == 200
    gateway.inside.spend[0](150)
    over = gateway.ask("POST", "/v1/completions", headers=headers, json={})
    assert over.status_code == 429
    assert int(over.headers["retry-after"]) >= 30
    assert gateway.counted == {"tokens_per_minute": 1}


def test_one_connection_serves_on_after_a_refusal(gateway: Gateway) -> None:
    headers = gateway.key(Scope.INFER)
    with httpx.Client(base_url=gateway.url) as client:
        for _ in range(3):
            assert client.post("/v1/x", content=b"x" * 5000).status_code == 401
            assert client.post("/v1/x", content=b"x" * 5000, headers=headers).json() == {"bytes": 5000}
        assert client.post("/v1/x", content=b"x" * 500_000).status_code == 401
        assert client.post("/v1/x", content=b"x", headers=headers).json() == {"bytes": 1}


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
    assert status(local.raw(f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())) == wanted
    assert status(local.raw(b"GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n")) == 200


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
