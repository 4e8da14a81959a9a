"""`Proxy`: the ASGI application behind /v1/completions and /v1/chat/completions.

A request's body is parsed once, to see which model it names and what the hooks make of it; what they leave alone goes
to vLLM byte for byte. Beyond that this module knows nothing of what clients ask and vLLM answers.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from moestro_services.gateway.caller import CALLER, LOCAL, Caller
from moestro_services.gateway.deployments import Deployment
from moestro_services.gateway.errors import Refused, UnavailableError
from moestro_services.gateway.exchange import Exchange, Outcome, UntilClientLeaves
from moestro_services.gateway.fleet import Fleet
from moestro_services.gateway.replica import Replica
from moestro_services.gateway.routes import name_in
from moestro_services.gateway.traffic import MODEL, VERSION, Traffic
from moestro_services.gateway.upstream import Upstream
from moestro_services.gateway.watch import Watch

REQUEST_HEADERS = ("content-type", "accept", "traceparent", "tracestate")
REQUEST_ID = "moestro.request_id"
SPEND = "moestro.spend"
SESSION_HEADER = "x-session-id"
MAX_BODY_BYTES = 32 << 20


class Answered(Protocol):
    """Hears of every answer of a model. Neither raises nor waits."""

    def answered(self, deployment: Deployment, path: str, request: bytes, answer: bytes | None) -> None:
        """`request` was answered by `deployment` with `answer`; None for streams and for what broke off."""


class Preparing(Protocol):
    """May change a request before it goes to the model. Does not wait."""

    def prepare(self, caller: Caller, deployment: Deployment, body: dict[str, Any]) -> dict[str, Any]:
        """The body to send: `body` itself if it is right, else a new one (never `body` changed in place, at whatever
        depth: it may go on as the client's own bytes). Raises `Refused`."""


class Proxy:
    """Finds the replica that is to answer, and lets it."""

    def __init__(
        self,
        fleet: Fleet,
        upstream: Upstream,
        traffic: Traffic,
        *,
        watch: Watch | None = None,
        answered: Sequence[Answered] = (),
        preparing: Sequence[Preparing] = (),
        max_body_bytes: int = MAX_BODY_BYTES,
    ) -> None:
        """Bodies of more than `max_body_bytes` are refused with 413."""
        self._fleet = fleet
        self._upstream = upstream
        self._traffic = traffic
        self._watch = watch
        self._answered = tuple(answered)
        self._preparing = tuple(preparing)
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        headers = Headers(scope=scope)
        caller: Caller = scope.get(CALLER, LOCAL)
        try:
            raw = await read_body(headers, receive, self._max_body_bytes)
            if raw is None:
                return
            body = parsed(raw)
            scope[MODEL] = name_in(self._fleet.table, body["model"])
            replica, endpoint = self._fleet.enter(body["model"], sticky(headers, body, caller))
        except Refused as refused:
            if self._watch and isinstance(refused, UnavailableError) and refused.version:
                self._watch.answered(
                    scope[MODEL], refused.version, caller=caller.id, failed=True, streamed=False, seconds=None
                )
            await self._refuse(refused, scope, receive, send)
            return
        deployment = replica.deployment
        assert deployment is not None
        scope[VERSION] = deployment.version
        exchange = Exchange(self._upstream, replica, endpoint, send)
        try:
            raw = self._prepared(caller, deployment, body, raw)
            with UntilClientLeaves(receive):
                await exchange.run(scope["path"], raw, _sent(headers, scope))
        except Refused as refused:
            await self._refuse(refused, scope, receive, send)
        finally:
            replica.leave()
            self._account(scope, replica, deployment, raw, exchange.outcome)

    def _prepared(self, caller: Caller, deployment: Deployment, body: dict[str, Any], raw: bytes) -> bytes:
        """The bytes to send: the client's own, unless a hook changed them or the model goes by another name."""
        before = dict(body)
        for hook in self._preparing:
            body = hook.prepare(caller, deployment, body)
        if body["model"] != deployment.name:
            body = body | {"model": deployment.name}
        try:
            return raw if body == before else json.dumps(body).encode()
        except RecursionError:
            raise _not_json() from None

    async def _refuse(self, refused: Refused, scope: Scope, receive: Receive, send: Send) -> None:
        self._traffic.refused(refused.code)
        await refused.response()(scope, receive, send)

    def _account(
        self, scope: Scope, replica: Replica, deployment: Deployment, request: bytes, outcome: Outcome
    ) -> None:
        """Tell everybody who counts."""
        usage = outcome.usage
        if usage.total:
            self._traffic.spent(deployment, usage)
            if SPEND in scope:
                scope[SPEND](usage.total)
        if self._watch and (outcome.failed or (outcome.seconds is not None and not outcome.mistaken)):
            self._watch.answered(
                deployment.name,
                replica.version.version,
                caller=scope.get(CALLER, LOCAL).id,
                failed=outcome.failed,
                streamed=outcome.streamed,
                seconds=outcome.seconds,
            )
        if outcome.seconds is not None and not outcome.failed:
            for hook in self._answered:
                hook.answered(deployment, scope["path"], request, outcome.answer)


async def read_body(headers: Headers, receive: Receive, limit: int) -> bytes | None:
    """The request's body, or None if the client left; raises `Refused` if it has more than `limit` bytes."""
    declared = headers.get("content-length", "")
    body = bytearray()
    size = int(declared) if declared.isdecimal() and len(declared) < 19 else len(declared)
    more = True
    while size <= limit and more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        size = max(size, len(body))
        more = message.get("more_body", False)
    if size > limit:
        raise Refused(413, f"The request has more than {limit} bytes.")
    return bytes(body)


def parsed(raw: bytes) -> dict[str, Any]:
    """The request's body, which names a model; raises `Refused` if it does not."""
    try:
        body = json.loads(raw, parse_constant=_no_number, parse_float=_finite)
    except (ValueError, RecursionError):
        raise _not_json() from None
    if not isinstance(body, dict) or not isinstance(body.get("model"), str):
        raise Refused(400, "The request names no model.", code="missing_model", param="model")
    return body


def _not_json() -> Refused:
    return Refused(400, "The request's body is not valid JSON.", code="invalid_json")


def _no_number(name: str) -> None:
    """Python reads NaN and Infinity, which are no JSON and would reach the sampler."""
    raise ValueError(name)


def _finite(text: str) -> float:
    """Nor may a number be so large that it is read as infinity."""
    if math.isinf(number := float(text)):
        raise ValueError(text)
    return number


def sticky(headers: Headers, body: Mapping[str, Any], caller: Caller) -> str:
    """What keeps a client with one version while there is a canary: its session, its user, or its key."""
    user = body.get("user")
    return headers.get(SESSION_HEADER) or (user if isinstance(user, str) and user else caller.id)


def _sent(headers: Headers, scope: Scope) -> dict[str, str]:
    sent = {name: headers[name] for name in REQUEST_HEADERS if name in headers}
    request_id = scope.get(REQUEST_ID) or headers.get("x-request-id")
    return sent | ({"x-request-id": request_id} if request_id else {})
