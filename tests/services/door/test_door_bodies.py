"""Bodies and time at the door: what is too large or too slow ends in words, and every place is freed."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import anyio
import httpx
import openai
import pytest
from starlette.types import Message, Receive, Send
from starlette.types import Scope as AsgiScope

from moestro_services.gateway.caller import Scope
from moestro_services.gateway.door import LINGER_SECONDS, Door
from moestro_services.gateway.limits import Limits

Gateway = Any
"""`conftest.Gateway`."""


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


def test_who_asks_before_sending_is_told_without_sending(
    gateway: Gateway, answered: Callable[[socket.socket], bytes]
) -> None:
    key = gateway.key(Scope.INFER)["Authorization"]
    head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\n%sContent-Length: %d\r\nExpect: 100-continue\r\n\r\n"
    began = time.monotonic()
    assert gateway.status((head % (f"Authorization: {key}\r\n", 10_001)).encode()) == 413
    assert gateway.status((head % ("", 10_001)).encode()) == 401
    assert time.monotonic() - began < LINGER_SECONDS
    with closing(gateway.connect()) as client:
        client.sendall((head % (f"Authorization: {key}\r\n", 3)).encode())
        assert client.recv(100).startswith(b"HTTP/1.1 100 ")
        client.sendall(b"abc")
        assert answered(client).endswith(b'{"bytes": 3}')


def test_a_slow_body_is_a_408(hasty: Gateway) -> None:
    key = hasty.key(Scope.INFER)["Authorization"]
    for framing in ("Content-Length: 5", "Transfer-Encoding: chunked"):
        head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: {key}\r\n{framing}\r\n\r\n"
        answer = hasty.raw(head.encode(), more=b"2\r\nab\r\n" if "chunked" in framing else b"ab")
        assert answer.startswith(b"HTTP/1.1 408 ")
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


def test_one_connection_serves_on_after_a_refusal(gateway: Gateway) -> None:
    headers = gateway.key(Scope.INFER)
    with httpx.Client(base_url=gateway.url) as client:
        for _ in range(3):
            assert client.post("/v1/x", content=b"x" * 5000).status_code == 401
            assert client.post("/v1/x", content=b"x" * 5000, headers=headers).json() == {"bytes": 5000}
        assert client.post("/v1/x", content=b"x" * 500_000).status_code == 401
        assert client.post("/v1/x", content=b"x", headers=headers).json() == {"bytes": 1}
