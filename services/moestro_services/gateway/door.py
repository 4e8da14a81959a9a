"""`Door`: the ASGI middleware that every request passes, and that lets in who may come in.

In this order: is it a proper request, whose key does it bear, may that key do this, is it within its limits, is the
body there, whole, small enough and in time. Only then does the application see it; until then nothing of it has cost
more than a few comparisons. Whatever ends a request (an answer, an error, a client that leaves), its place is free.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moestro.errors import ConfigError
from moestro_services.gateway.access import (
    Headers,
    Need,
    Reason,
    RefusedError,
    needed,
    revoked_key,
    routed_path,
    wrong_key,
)
from moestro_services.gateway.caller import CALLER, LOCAL, Caller
from moestro_services.gateway.caller import Scope as KeyScope
from moestro_services.gateway.errors import refusal
from moestro_services.gateway.keys import Key, KeyRing
from moestro_services.gateway.limits import CODE, Clock, Limits, Meter, Meters, OverLimitError

SPEND = "moestro.spend"
"""Key of the request's scope under which the door leaves a function that charges the caller for tokens."""
REFUSED = "moestro.refused"
"""Key of the request's scope under which the door leaves the reason of a refusal."""
ANYONE = Caller("", frozenset())
"""Who asks on paths that are open."""
LINGER_SECONDS = 2.0
"""How long what a refused client still sends is taken from it, so that it comes to read the refusal."""
SMALL_BODY = 64 << 10
"""A refused body up to this size is worth keeping the connection for."""
POLICY_VIOLATION = 1008


class Door:
    """Lets in requests with a key of `keys`, or with `keys` None all that come from this machine.

    `limits` hold for keys without limits of their own. `counted` hears the `Reason` of every refusal.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: KeyRing | None,
        limits: Limits,
        counted: Callable[[str], None],
        clock: Clock = time.monotonic,
    ) -> None:
        self.app = app
        self.keys = keys
        self.limits = limits
        self.counted = counted
        self.meters = Meters(clock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            self.counted(Reason.MALFORMED)
            await send({"type": "websocket.close", "code": POLICY_VIOLATION})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = _Answer(send)
        try:
            headers = Headers(scope["headers"])
            length = headers.body_length()
            need = needed(scope["method"], routed_path(scope))
            if need is Need.NOTHING:
                scope[CALLER] = ANYONE
                await self.app(scope, receive, send)
                return
            caller, limits = self._caller(scope["method"], headers)
            if isinstance(need, KeyScope) and not caller.may(need):
                raise RefusedError(
                    403, Reason.SCOPE, f"The API key lacks the scope {need.value!r}.", code="insufficient_scope"
                )
            scope[CALLER] = caller
            if need is not KeyScope.INFER:
                answer.beginning_suffices = True
            await self._metered(scope, receive, answer, limits, length)
        except RefusedError as refused:
            await self._refuse(refused, scope, receive, answer)

    def _caller(self, method: str, headers: Headers) -> tuple[Caller, Limits]:
        """Who asks, and their limits; raises `RefusedError` if it is nobody we know."""
        if self.keys is None:
            headers.check_local(method)
            return LOCAL, self.limits
        headers.one(b"host")
        key = self._key(headers.secret(), self.keys)
        return Caller(key.id, key.scopes), key.limits.over(self.limits)

    @staticmethod
    def _key(secret: str, keys: KeyRing) -> Key:
        try:
            key = keys.known(secret)
        except ConfigError:
            raise RefusedError(
                503, Reason.KEYS, "The API keys cannot be read.", code="keys_unavailable", retry_after="5"
            ) from None
        if key is None:
            raise wrong_key()
        if not key.live:
            raise revoked_key()
        return key

    async def _metered(
        self, scope: Scope, receive: Receive, answer: "_Answer", limits: Limits, length: int | None
    ) -> None:
        """Answer within the limits."""
        meter = self.meters.of(scope[CALLER].id, limits)
        scope[SPEND] = meter.spend
        try:
            with meter.request():
                await self._timed(scope, receive, answer, meter, length)
        except OverLimitError as over:
            message = f"Rate limit reached. {over.message} Ask again in {over.retry_after} s."
            raise RefusedError(429, Reason(over.limit), message, code=CODE, retry_after=str(over.retry_after)) from None

    async def _timed(self, scope: Scope, receive: Receive, answer: "_Answer", meter: Meter, length: int | None) -> None:
        """Answer in time. An answer that has begun is cut off, which the client notices."""
        limits = meter.limits
        timer = asyncio.timeout(limits.request_seconds)
        try:
            async with timer:
                if length != 0:
                    body = await _body(receive, limits, length)
                    if body is None:
                        return  # the client left
                    receive = _after(body, receive)
                answer.timer = timer
                await self.app(scope, receive, answer)
        except TimeoutError:
            if not timer.expired():
                raise
            if not answer.started:
                message = f"The request took more than {limits.request_seconds:g} s."
                raise RefusedError(504, Reason.TIME, message, code="request_timeout", x_should_retry="false") from None
            self._note(Reason.TIME, scope)

    def _note(self, reason: Reason, scope: Scope) -> None:
        scope[REFUSED] = reason.value
        self.counted(reason.value)

    async def _refuse(self, refused: RefusedError, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        """Say no. What a client still sends is taken for a while, so that it reads the answer before a closed door."""
        self._note(refused.reason, scope)
        late = refused.reason in (Reason.BODY_TIME, Reason.TIME)
        sending = not late and _sends_much(scope)
        headers = refused.headers | ({"connection": "close"} if sending else {})
        response = refusal(scope["path"], refused.status, refused.message, headers, code=refused.code)
        if not sending:
            await response(scope, receive, answer)
            return
        await response(scope, receive, answer.left_open)
        await _drain(receive)
        await answer({"type": "http.response.body", "body": b""})


class _Answer:
    """`send`, and whether it was used. Costs a stream's chunks one comparison."""

    __slots__ = ("_send", "beginning_suffices", "started", "timer")

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False
        self.timer: asyncio.Timeout | None = None
        self.beginning_suffices = False
        """Whether the time is kept by an answer that has begun."""

    def __call__(self, message: Message) -> Awaitable[None]:
        if not self.started:
            self.started = True
            if self.timer is not None and self.beginning_suffices and not self.timer.expired():
                self.timer.reschedule(None)
        return self._send(message)

    def left_open(self, message: Message) -> Awaitable[None]:
        """Send, but as if more were to come."""
        return self({**message, "more_body": True} if message["type"] == "http.response.body" else message)


async def _body(receive: Receive, limits: Limits, length: int | None) -> Message | None:
    """The whole body as one message, None if the client left; raises `RefusedError` if it is too large or too slow."""
    most = limits.max_body_bytes
    if most is not None and length is not None and length > most:
        raise _too_large(most)
    body = bytearray()
    timer = asyncio.timeout(limits.body_seconds)
    try:
        async with timer:
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    return None
                if not body and not message.get("more_body"):
                    body = message.get("body", b"")  # the usual case: no copy
                else:
                    body += message.get("body", b"")
                if most is not None and len(body) > most:
                    raise _too_large(most)
                if not message.get("more_body"):
                    return {"type": "http.request", "body": bytes(body), "more_body": False}
    except TimeoutError:
        late = f"The request's body had not come after {limits.body_seconds:g} s."
        raise RefusedError(408, Reason.BODY_TIME, late, code="request_timeout", connection="close") from None


def _too_large(most: int) -> RefusedError:
    message = f"The request has more than {most} bytes."
    return RefusedError(413, Reason.BODY_SIZE, message, code="request_too_large", connection="close")


def _after(body: Message, receive: Receive) -> Receive:
    """A `receive` that gives `body` first."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return body

    return replay


def _sends_much(scope: Scope) -> bool:
    """Whether the client may be in the midst of sending what it must finish before it reads."""
    headers = dict(scope["headers"])
    if b"expect" in headers:
        return False
    length = headers.get(b"content-length", b"0")
    large = not length.isdigit() or len(length) > 18 or int(length) > SMALL_BODY
    return large or b"transfer-encoding" in headers


async def _drain(receive: Receive) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            while (message := await receive())["type"] == "http.request" and message.get("more_body"):
                pass
