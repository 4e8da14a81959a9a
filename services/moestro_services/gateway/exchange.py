"""One request's way to a model server and back: bytes pass as they come, and leave no connection behind.

Nothing is sent to the client before the answer's first bytes are there, so that a server that dies before then is a
clean 503. A client that leaves cancels the request at the server at once.
"""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType

import aiohttp
from starlette.types import Message, Receive, Send

from moestro_services.gateway.errors import UnavailableError, openai_error
from moestro_services.gateway.replica import Endpoint, Replica
from moestro_services.gateway.upstream import LOST, Upstream
from moestro_services.gateway.usage import FAILED, FAILED_EVENT, StreamUsage, Usage, error_status, read_usage

RESPONSE_HEADERS = ("content-type", "content-length", "content-encoding", "cache-control", "retry-after")
EVENT_STREAM = "text/event-stream"


class UntilClientLeaves:
    """Block that is left, without an error, when the client does. `left` says whether it was."""

    def __init__(self, receive: Receive) -> None:
        self.left = False
        self._receive = receive
        self._inside = False

    def __enter__(self) -> "UntilClientLeaves":
        """Begin to listen."""
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._cancelling = task.cancelling()
        self._inside = True
        self._listening = asyncio.ensure_future(self._listen())
        self._listening.add_done_callback(self._leave)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> bool:
        """Stop listening."""
        self._inside = False
        self._listening.cancel()
        if not self.left or self._task.uncancel() > self._cancelling:
            return False
        return kind is asyncio.CancelledError

    async def _listen(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    def _leave(self, listening: "asyncio.Future[None]") -> None:
        if self._inside and not listening.cancelled():
            self.left = True
            self._task.cancel()


@dataclass
class Outcome:
    """What became of a request."""

    failed: bool = False
    """Whether the server is to blame."""
    mistaken: bool = False
    """Whether the client is: the server's own 4xx, also as an event of a stream."""
    streamed: bool = False
    seconds: float | None = None
    """Until the first byte."""
    usage: Usage = field(default_factory=Usage)
    answer: bytes | None = None
    """The whole body, unless it was streamed or broke off."""


class Exchange:
    """Sends a request and passes the answer on."""

    def __init__(self, upstream: Upstream, replica: Replica, endpoint: Endpoint, send: Send) -> None:
        self.outcome = Outcome()
        self._upstream = upstream
        self._replica = replica
        self._endpoint = endpoint
        self._send = send

    async def run(self, path: str, body: bytes, headers: Mapping[str, str]) -> None:
        """Pass the whole answer on; raises `UnavailableError` if the server is lost before it begins."""
        began = time.perf_counter()
        try:
            response = await self._upstream.post(self._endpoint, path, body, headers)
        except LOST as error:
            raise self._lost(error) from None
        try:
            first = await self._first(response)
            self.outcome.seconds = time.perf_counter() - began
            await self._send(_start(response))
            await self._pass_on(response, first)
        finally:
            response.close()

    async def _first(self, response: aiohttp.ClientResponse) -> bytes:
        """The first bytes of an answer that may be passed on."""
        try:
            first: bytes = await response.content.readany()
            broken = max(response.status, error_status(first) if first.startswith(FAILED_EVENT) else 0) >= FAILED
            if response.status == 401 or (broken and not await self._upstream.healthy(self._endpoint)):
                raise self._refuse(response.status)
        except LOST as error:
            raise self._lost(error) from None
        self.outcome.failed = broken
        self.outcome.mistaken = 400 <= response.status < FAILED
        self.outcome.streamed = response.content_type == EVENT_STREAM
        return first

    async def _pass_on(self, response: aiohttp.ClientResponse, chunk: bytes) -> None:
        content, send = response.content, self._send
        counted = StreamUsage() if self.outcome.streamed else None
        kept: list[bytes] = []
        keep = counted.add if counted else kept.append
        try:
            while True:
                keep(chunk)
                more = bool(chunk) and not content.at_eof()
                await send({"type": "http.response.body", "body": chunk, "more_body": more})
                if not more:
                    break
                chunk = await content.readany()
        except LOST as error:
            lost = self._lost(error)
            if counted:
                await send({"type": "http.response.body", "body": _error_event(lost, chunk)})
            # Else the answer stays incomplete and the server drops the connection, so that the client notices.
        else:
            self.outcome.answer = None if counted else b"".join(kept)
        finally:
            if counted:
                self.outcome.usage = counted.usage()
                self.outcome.failed |= counted.error >= FAILED
                self.outcome.mistaken |= 400 <= counted.error < FAILED
            elif response.status == 200:
                self.outcome.usage = read_usage(b"".join(kept)) or Usage()

    def _lost(self, error: BaseException) -> UnavailableError:
        self.outcome.failed = True
        return UnavailableError(
            f"The server of model {self._replica.label!r} cannot be reached: {str(error) or type(error).__name__}."
        )

    def _refuse(self, status: int) -> UnavailableError:
        """Its engine is dead, or what answers is not it: it is started again."""
        why = "Another server answered at its address." if status == 401 else "Its engine is dead."
        self._replica.fail(self._endpoint, why)
        self.outcome.failed = True
        return UnavailableError(f"The server of model {self._replica.label!r} is being started again.")


def _start(response: aiohttp.ClientResponse) -> Message:
    found = response.headers
    kept = [(name.encode(), found[name].encode("latin-1")) for name in RESPONSE_HEADERS if name in found]
    return {"type": "http.response.start", "status": response.status, "headers": kept}


def _error_event(lost: UnavailableError, before: bytes) -> bytes:
    """The error as a last event, apart from one that broke off."""
    apart = b"" if before.endswith(b"\n\n") else b"\n\n"
    return apart + b"data: " + bytes(openai_error(503, lost.message).body) + b"\n\n"
