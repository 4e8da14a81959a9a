"""A stand-in for a vLLM server, of fixed speed: `python -m moestro_services.gateway_bench.standin SOCKET_FD`.

It answers every completion with events at fixed intervals, so that what a gateway adds can be told from what a busy
model takes. It computes nothing: no figure of it is one of a model.
"""

import asyncio
import json
import socket
import sys
from typing import Any

import uvicorn
from starlette.types import Receive, Scope, Send

FIRST_TOKEN_SECONDS = 0.05
TOKEN_SECONDS = 0.05


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """ASGI: /health, and /v1/completions as a stream of `max_tokens` events."""
    if scope["type"] != "http":
        return
    if scope["path"] != "/v1/completions":
        await _start(send, b"application/json")
        await send({"type": "http.response.body", "body": b"{}"})
        return
    asked = await _asked(receive)
    await asyncio.sleep(FIRST_TOKEN_SECONDS)
    await _start(send, b"text/event-stream; charset=utf-8")
    for number in range(asked["max_tokens"]):
        if number:
            await asyncio.sleep(TOKEN_SECONDS)
        await send({"type": "http.response.body", "body": _event(asked["model"], number), "more_body": True})
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def _asked(receive: Receive) -> dict[str, Any]:
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    asked: dict[str, Any] = json.loads(body)
    return asked


async def _start(send: Send, kind: bytes) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})


def _event(model: str, number: int) -> bytes:
    choice = {"index": 0, "text": f" {number}", "logprobs": None, "finish_reason": None, "stop_reason": None}
    event = {"id": "cmpl-0", "object": "text_completion", "created": 0, "model": model, "choices": [choice]}
    return b"data: " + json.dumps(event).encode() + b"\n\n"


def main() -> None:
    """Entry point: serve on the listening socket that was handed down."""
    listening = socket.socket(fileno=int(sys.argv[1]))
    uvicorn.Server(uvicorn.Config(app, log_level="critical", access_log=False)).run(sockets=[listening])


if __name__ == "__main__":
    main()
