"""Clients that never come to the end of a request, in raw bytes to a real server."""

import functools
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from moestro_services.gateway.connections import CarefulProtocol, careful
from moestro_services.gateway.listening import listen, serving


async def ok(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers without reading the body; /read reads it first."""
    if scope["type"] != "http":
        return
    if scope["path"] == "/read":
        while (await receive()).get("more_body"):
            pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def counted() -> Counter[str]:
    return Counter()


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch, counted: Counter[str]) -> Iterator[tuple[str, int]]:
    monkeypatch.setattr(CarefulProtocol, "head_seconds", 0.5)
    monkeypatch.setattr(CarefulProtocol, "rest_seconds", 0.5)
    config: Any = functools.partial(uvicorn.Config, http=careful(lambda why: counted.update([why])))
    monkeypatch.setattr(uvicorn, "Config", config)
    with serving(ok, listen("127.0.0.1", 0)) as url:
        host, port = url.removeprefix("http://").split(":")
        yield host, int(port)


def until_closed(client: socket.socket) -> bytes:
    got = b""
    try:
        while part := client.recv(65536):
            got += part
    except ConnectionResetError:
        pass
    return got


@pytest.mark.parametrize(
    "head", [b"G", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nX: y", b"POST /" + b"x" * 99]
)
def test_a_head_that_never_ends_is_a_408(address: tuple[str, int], counted: Counter[str], head: bytes) -> None:
    with closing(socket.create_connection(address, timeout=10)) as client:
        client.sendall(head)
        assert until_closed(client).startswith(b"HTTP/1.1 408 ")
    assert counted == {"head_seconds": 1}


def test_a_head_that_drips_is_a_408(address: tuple[str, int], counted: Counter[str]) -> None:
    with closing(socket.create_connection(address, timeout=0.05)) as client:
        client.sendall(b"GET / HTTP/1.1\r\n")
        got = b""
        for _ in range(200):
            try:
                got += client.recv(1000)
                break
            except TimeoutError:
                client.sendall(b"X-A: b\r\n")
    assert got.startswith(b"HTTP/1.1 408 ")
    assert counted == {"head_seconds": 1}


def test_a_connection_without_a_word_is_closed(address: tuple[str, int], counted: Counter[str]) -> None:
    with closing(socket.create_connection(address, timeout=10)) as client:
        assert until_closed(client) == b""
    assert counted == {}


@pytest.mark.parametrize("piece", [b"X: " + b"a" * 50_000 + b"\r\n", b"a" * 50_000])
def test_a_head_without_end_is_a_431(address: tuple[str, int], counted: Counter[str], piece: bytes) -> None:
    with closing(socket.create_connection(address, timeout=10)) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nY: ")
        try:
            for _ in range(100):
                client.sendall(piece)
        except (BrokenPipeError, ConnectionResetError):
            pass
        got = until_closed(client)
    assert got == b"" or got.startswith(b"HTTP/1.1 431 ")  # a reset may overtake the answer
    assert counted == {"head_bytes": 1}


def test_the_rest_of_an_unwanted_body_is_not_waited_for(address: tuple[str, int], counted: Counter[str]) -> None:
    with closing(socket.create_connection(address, timeout=10)) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\nabc")
        assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
        client.sendall(b"abc")
        assert until_closed(client) in (b"", b"ok")
    assert counted == {}


def test_what_is_no_http_is_counted(address: tuple[str, int], counted: Counter[str]) -> None:
    with closing(socket.create_connection(address, timeout=10)) as client:
        client.sendall(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n")
        assert until_closed(client).startswith(b"HTTP/1.1 400 ")
    assert counted == {"malformed": 1}


def test_patient_requests_one_after_another_and_pipelined_are_answered(
    address: tuple[str, int], counted: Counter[str]
) -> None:
    ask = b"POST /read HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc"
    with closing(socket.create_connection(address, timeout=10)) as client:
        for _ in range(3):
            client.sendall(ask)
            assert client.recv(1000).endswith(b"ok")
        client.sendall(ask * 5)
        got = b""
        while got.count(b"ok") < 5:
            got += client.recv(1000)
        assert got.count(b"HTTP/1.1 200 ") == 5
        client.sendall(ask[:-1])
        client.settimeout(0.8)  # longer than the head may take
        with pytest.raises(TimeoutError):
            client.recv(1)
        client.settimeout(10)
        client.sendall(b"c")
        assert client.recv(1000).endswith(b"ok")
    assert counted == {}
