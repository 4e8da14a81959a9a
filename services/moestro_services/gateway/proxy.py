"""Passing a model request to vLLM and its answer back, byte for byte, as it comes.

A client that leaves cancels the request at vLLM at once, whether or not the answer has begun.
"""

import json

import anyio
import httpx
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from moestro_services.gateway.deployments import Deployment
from moestro_services.gateway.errors import openai_error, unavailable
from moestro_services.gateway.traffic import MODEL

REQUEST_HEADERS = ("content-type", "accept", "x-request-id", "traceparent", "tracestate")
RESPONSE_HEADERS = (
    "content-type",
    "content-length",
    "content-encoding",
    "cache-control",
    "x-request-id",
    "retry-after",
)
TIMEOUT = httpx.Timeout(connect=5, read=600, write=60, pool=None)
EVENT_STREAM = "text/event-stream"


def upstream_client() -> httpx.AsyncClient:
    """The client with which model servers are asked; ignores proxies that the environment names."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
    return httpx.AsyncClient(timeout=TIMEOUT, limits=limits, trust_env=False)


async def read_body(request: Request, limit: int) -> bytes | None:
    """The request's body, or None if it has more than `limit` bytes."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        return None
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            return None
    return bytes(body)


def wanted_model(body: bytes) -> str | Response:
    """The model a request names, or the refusal of a request that names none."""
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        return openai_error(400, "The request's body is not valid JSON.", code="invalid_json")
    model = parsed.get("model") if isinstance(parsed, dict) else None
    if not isinstance(model, str):
        return openai_error(400, "The request names no model.", code="missing_model", param="model")
    return model


class Forwarded(Response):
    """The response that a deployment's server gives to `request` with `body`."""

    def __init__(self, client: httpx.AsyncClient, deployment: Deployment, request: Request, body: bytes) -> None:
        super().__init__()
        self._client = client
        self._deployment = deployment
        self._url = deployment.server.url + request.url.path
        self._body = body
        self._sent = {name: request.headers[name] for name in REQUEST_HEADERS if name in request.headers}
        self._sent["accept-encoding"] = "identity"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[MODEL] = self._deployment.name
        async with anyio.create_task_group() as group:

            async def leave_with_client() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                group.cancel_scope.cancel()

            group.start_soon(leave_with_client)
            await self._forward(scope, receive, send)
            group.cancel_scope.cancel()

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer: httpx.Response | None = None
        try:
            async with self._client.stream("POST", self._url, content=self._body, headers=self._sent) as answer:
                await send(_start(answer))
                async for chunk in answer.aiter_raw():
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
        except httpx.TransportError as error:
            lost = unavailable(f"The server of model {self._deployment.name!r} cannot be reached: {_words(error)}.")
            if answer is None:
                await lost(scope, receive, send)
            elif answer.headers.get("content-type", "").startswith(EVENT_STREAM):
                event = b"data: " + bytes(lost.body) + b"\n\n"
                await send({"type": "http.response.body", "body": event})
            # Else the answer stays incomplete and the server drops the connection, so that the client notices.


def _start(answer: httpx.Response) -> dict[str, object]:
    kept = [(name, answer.headers[name]) for name in RESPONSE_HEADERS if name in answer.headers]
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in kept]
    return {"type": "http.response.start", "status": answer.status_code, "headers": headers}


def _words(error: httpx.TransportError) -> str:
    return str(error) or type(error).__name__
