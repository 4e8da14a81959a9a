"""The door before a real HTTP server, spoken to in raw bytes.

The application behind it tells what it was given; the path's end says how it behaves.
"""

import asyncio
import json
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.types import Receive, Send
from starlette.types import Scope as AsgiScope

from moestro_services.gateway.caller import Caller, Scope, caller_of
from moestro_services.gateway.door import SPEND, Door
from moestro_services.gateway.keys import KeyRing
from moestro_services.gateway.limits import Limits
from moestro_services.gateway.listening import listen, serving

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
        body = await Request(scope, receive).body()
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

    def status(self, request: bytes, *, more: bytes = b"") -> int:
        """The status of what comes back for these bytes."""
        return status(self.raw(request, more=more))

    def in_flight(self) -> int:
        return sum(meter.in_flight for meter in self.door.meters._meters.values())


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer else 0


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


@pytest.fixture
def answered() -> Callable[[socket.socket], bytes]:
    return everything


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
