"""The request log: who asked what of which model, and how it ended, one JSON line a request.

`Logged` is the outermost middleware. It gives every request an id, or takes the client's if it is harmless, and answers
with it. Neither bodies nor headers nor paths are written: a route is named by its template. Lines go to the disk from a
thread of their own; if it cannot keep up, lines are left out and counted, and no request waits.
"""

import json
import logging
import queue
import re
import secrets
import threading
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from logging.handlers import QueueListener, RotatingFileHandler
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moestro_flows.home import Home
from moestro_services.gateway.caller import CALLER
from moestro_services.gateway.door import REFUSED
from moestro_services.gateway.traffic import MODEL, VERSION

REQUEST_ID = "moestro.request_id"
"""Key of the request's scope under which its id is left."""
HEADER = b"x-request-id"
HARMLESS = re.compile(rb"[A-Za-z0-9._-]{1,64}")
MAX_BYTES = 32 << 20
KEPT_FILES = 5
MOST_WAITING = 10_000
REST_SECONDS = 0.2
LEFT = 499
"""The status of a request whose client left before an answer had begun."""
FAILED = 500


class RequestLog:
    """Writes lines to `path`, which is followed by `path`.1 and so on when it is full. Starts with its first line."""

    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES, kept_files: int = KEPT_FILES) -> None:
        self.path = path
        self.lost = 0
        """Lines left out because the disk could not keep up, or took none."""
        self._size = (max_bytes, kept_files)
        self._queue: queue.Queue[logging.LogRecord] = queue.Queue(MOST_WAITING)
        self._listener: QueueListener | None = None
        self._starting = threading.Lock()

    @classmethod
    def of(cls, home: Home) -> "RequestLog":
        """The request log of a home."""
        return cls(home.logs / "gateway.jsonl")

    def write(self, line: dict[str, Any]) -> None:
        """Have the line written; never waits for the disk."""
        if self._listener is None:
            self._start()
        try:
            self._queue.put_nowait(logging.makeLogRecord({"msg": line}))
        except queue.Full:
            self._lose()

    def close(self) -> None:
        """Write what waits and close the file. A later line opens it again."""
        with self._starting:
            listener, self._listener = self._listener, None
        if listener is not None:
            listener.stop()
            for handler in listener.handlers:
                handler.close()

    def _start(self) -> None:
        with self._starting:
            if self._listener is None:
                listener = _Listener(self._queue, _File(self.path, *self._size, self._lose))
                listener.start()
                self._listener = listener

    def _lose(self) -> None:
        self.lost += 1


class _Listener(QueueListener):
    """The thread that writes. It rests between batches: woken for each line, it would take requests their time."""

    def __init__(self, lines: queue.Queue[logging.LogRecord], file: logging.Handler) -> None:
        super().__init__(lines, file)
        self._ending = threading.Event()

    def dequeue(self, block: bool) -> logging.LogRecord:
        """The next line."""
        if self.queue.empty():  # type: ignore[attr-defined]
            self._ending.wait(REST_SECONDS)
        return super().dequeue(block)

    def enqueue_sentinel(self) -> None:
        """End; waits for its turn in a full queue."""
        self._ending.set()
        self.queue.put(self._sentinel)  # type: ignore[attr-defined]


class _File(RotatingFileHandler):
    """Opens its file, readable by its owner alone, with the first line."""

    def __init__(self, path: Path, max_bytes: int, kept_files: int, lose: Callable[[], None]) -> None:
        super().__init__(path, maxBytes=max_bytes, backupCount=kept_files, encoding="utf-8", delay=True)
        self._lose = lose

    def _open(self) -> Any:
        path = Path(self.baseFilename)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        return super()._open()

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(record.msg, separators=(",", ":"))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002, N802  (the standard library's name)
        """A full disk does not fill standard error as well."""
        self._lose()


class Logged:
    """ASGI middleware that writes a line to `log` for each request, and closes it when the application ends."""

    def __init__(self, app: ASGIApp, *, log: RequestLog) -> None:
        self.app = app
        self.log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            try:
                await self.app(scope, receive, send)
            finally:
                if scope["type"] == "lifespan":
                    self.log.close()
            return
        began = time.time()
        answer = _Answer(send, _identify(scope))
        failed = False
        try:
            await self.app(scope, receive, answer)
        except Exception:
            failed = True
            raise
        finally:
            self.log.write(_line(scope, answer, began, failed=failed))


class _Answer:
    """`send` with the request's id; notes the status, the first byte's time and the end."""

    __slots__ = ("_id", "_send", "ended", "first", "started", "status")

    def __init__(self, send: Send, request_id: bytes) -> None:
        self._send = send
        self._id = request_id
        self.started = time.perf_counter()
        self.status = 0
        self.first = 0.0
        self.ended = False

    def __call__(self, message: Message) -> Awaitable[None]:
        if not self.first:
            if message["type"] == "http.response.start":
                self.status = message["status"]
                headers = [pair for pair in message.get("headers", ()) if pair[0].lower() != HEADER]
                message = {**message, "headers": [*headers, (HEADER, self._id)]}
            else:
                self.first = time.perf_counter()
        if not message.get("more_body") and self.first:
            self.ended = True
        return self._send(message)


def _identify(scope: Scope) -> bytes:
    """The request's id, also in its headers, from which it goes on to the model's server."""
    given = [value for name, value in scope["headers"] if name == HEADER]
    if len(given) == 1 and HARMLESS.fullmatch(given[0]):
        made = given[0]
    else:
        made = secrets.token_hex(16).encode()
        scope["headers"] = [*(pair for pair in scope["headers"] if pair[0] != HEADER), (HEADER, made)]
    scope[REQUEST_ID] = made.decode()
    return made


def _line(scope: Scope, answer: _Answer, began: float, *, failed: bool) -> dict[str, Any]:
    now = time.perf_counter()
    caller = scope.get(CALLER)
    client = scope.get("client")
    return {
        "at": datetime.fromtimestamp(began, UTC).isoformat(timespec="milliseconds"),
        "request_id": scope[REQUEST_ID],
        "key": caller.id if caller is not None else "",
        "client": client[0] if client else "",
        "method": scope["method"] if scope["method"].isalpha() else "",
        "route": getattr(scope.get("route"), "path", ""),
        "model": scope.get(MODEL, ""),
        "version": scope.get(VERSION, ""),
        "status": answer.status or (FAILED if failed else LEFT),
        "refused": scope.get(REFUSED, ""),
        "complete": answer.ended,
        "first_byte_seconds": round(answer.first - answer.started, 6) if answer.first else None,
        "seconds": round(now - answer.started, 6),
    }
