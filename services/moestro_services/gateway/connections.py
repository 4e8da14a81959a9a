"""What uvicorn leaves open to slow and endless clients before there is a request that the door could refuse.

uvicorn waits for ever for the end of a request's head, however long it gets, and for the rest of a body that nobody
wants any more. `careful` makes its protocol end such connections, and count what it refuses.
"""

from asyncio import TimerHandle, Transport
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from moestro_services.gateway.access import Reason

HEAD_SECONDS = 30.0
HEAD_BYTES = 64 << 10
REST_SECONDS = 10.0
"""How long what follows an answer is still taken from its client."""


class CarefulProtocol(HttpToolsProtocol):
    """uvicorn's protocol with limits of time and size for a request's head, and of time for an unwanted body."""

    head_seconds = HEAD_SECONDS
    head_bytes = HEAD_BYTES
    rest_seconds = REST_SECONDS

    def __init__(self, *given: Any, counted: Callable[[str], None], **more: Any) -> None:
        super().__init__(*given, **more)
        self._counted = counted
        self._timer: TimerHandle | None = None
        self._in_head = False
        self._whole = True
        self._messages = 0
        self._size = 0

    def connection_made(self, transport: Transport) -> None:
        """A client connects: its first request's head may take so long."""
        super().connection_made(transport)
        self._after(self.head_seconds, self._slow_head)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count the bytes of a head that is not complete with them."""
        before = self._messages
        super().data_received(data)
        if self._in_head and self._messages == before:
            self._size += len(data)
            if self._size > self.head_bytes:
                self._refuse(431, "Request Header Fields Too Large", Reason.HEAD_SIZE)

    def on_message_begin(self) -> None:
        """A request's first byte."""
        self._messages += 1
        self._size, self._in_head, self._whole = 0, True, False
        self._after(self.head_seconds, self._slow_head)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The end of its head."""
        self._in_head = False
        self._disarm()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Its end."""
        self._whole = True
        self._disarm()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """The end of an answer, perhaps before that of its request."""
        super().on_response_complete()
        if not self._whole and not self._in_head and self.cycle.response_complete:
            self._after(self.rest_seconds, self.transport.close)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is refused and counted."""
        self._counted(Reason.MALFORMED)
        self._disarm()
        super().send_400_response(msg)

    def _slow_head(self) -> None:
        if not self._in_head:
            self.transport.close()  # nothing has come: nobody to tell
        elif self._answering():
            self._after(self.head_seconds, self._slow_head)
        else:
            self._refuse(408, "Request Timeout", Reason.HEAD_TIME)

    def _refuse(self, status: int, words: str, reason: Reason) -> None:
        if self.transport.is_closing():
            return
        self._counted(reason)
        if not self._answering():
            head = f"HTTP/1.1 {status} {words}\r\ncontent-type: text/plain\r\ncontent-length: {len(words)}\r\n"
            self.transport.write(f"{head}connection: close\r\n\r\n{words}".encode("ascii"))
        self.transport.close()

    def _answering(self) -> bool:
        """Whether an answer to an earlier request is on its way: nothing may be written into it."""
        return self.cycle is not None and not self.cycle.response_complete

    def _after(self, seconds: float, act: Callable[[], None]) -> None:
        self._disarm()
        self._timer = self.loop.call_later(seconds, act)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def careful(counted: Callable[[str], None]) -> Callable[..., CarefulProtocol]:
    """What uvicorn's `http` setting takes: makes protocols that tell `counted` the `Reason` of each refusal."""

    def make(*given: Any, **more: Any) -> CarefulProtocol:
        return CarefulProtocol(*given, counted=counted, **more)

    return make
