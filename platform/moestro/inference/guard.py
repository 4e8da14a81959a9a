"""`Keyed`: ASGI middleware of vLLM's server that wants the server's key wherever vLLM itself does not.

vLLM (0.30) guards /v1 and three prefixes more; /invocations, which also answers completions, it leaves open.
"""

import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

KEY_VARIABLE = "VLLM_API_KEY"
OPEN_PATH = "/health"
"""Tells nothing but whether the server lives, which is asked of whoever listens on its port."""
UNAUTHORIZED = 401
POLICY_VIOLATION = 1008
BODY = b'{"error":{"message":"Unauthorized","type":"Unauthorized","param":null,"code":401}}'


class Keyed:
    """Passes on what bears the key of the environment's VLLM_API_KEY, and questions after the server's health."""

    def __init__(self, app: Application) -> None:
        self._app = app
        self._wanted = f"Bearer {os.environ[KEY_VARIABLE]}".encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer 401, or let vLLM answer."""
        if scope["type"] == "lifespan" or scope["path"] == OPEN_PATH or self._bears_key(scope["headers"]):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": POLICY_VIOLATION})
        else:
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(BODY)).encode())]
            await send({"type": "http.response.start", "status": UNAUTHORIZED, "headers": headers})
            await send({"type": "http.response.body", "body": BODY})

    def _bears_key(self, headers: list[tuple[bytes, bytes]]) -> bool:
        return any(name == b"authorization" and secrets.compare_digest(value, self._wanted) for name, value in headers)
