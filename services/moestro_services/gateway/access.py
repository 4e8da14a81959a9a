"""Who may ask: on loopback everyone on this machine, elsewhere only who has the key.

On loopback the Host header must name this machine, so that a web page in a browser here cannot reach the gateway
through a name of its own (DNS rebinding).
"""

import hmac
import ipaddress
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from moestro.errors import ConfigError
from moestro_services.gateway.errors import refusal

LOCAL_NAMES = {"localhost", "127.0.0.1", "[::1]"}
OPEN_PATHS = {"/health", "/ready"}
MIN_KEY_LENGTH = 16


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_key(path: Path) -> str:
    """The API key in `path`; raises `ConfigError` if it is missing or too short to be one."""
    try:
        key = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a readable key file ({error}).") from None
    if len(key) < MIN_KEY_LENGTH or not key.isascii() or not key.isprintable():
        raise ConfigError(
            f"{path}: an API key has at least {MIN_KEY_LENGTH} printable ASCII characters, in one line.",
            hint="Make one with `openssl rand -hex 32`.",
        )
    return key


def check_exposure(host: str, key: str | None) -> None:
    """Raise `ConfigError` if `host` can be reached from other machines and there is no key."""
    if key is None and not is_loopback(host):
        raise ConfigError(
            f"{host} can be reached from other machines, and there is no API key.",
            hint="Give one with --api-key-file, or bind 127.0.0.1.",
        )


class Guarded:
    """ASGI middleware that lets only those in who may ask. /health and /ready are open to probes."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self.app = app
        self.key = key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            headers = Headers(scope=scope)
            if self.key is None and not _names_this_machine(headers.get("host", "")):
                await refusal(scope["path"], 400, "The Host header names another machine.")(scope, receive, send)
                return
            if self.key is not None and not _same(headers.get("authorization", ""), f"Bearer {self.key}"):
                await refusal(scope["path"], 401, "Incorrect or missing API key.")(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _names_this_machine(host: str) -> bool:
    name = host if host.endswith("]") else host.rpartition(":")[0] or host
    return name.lower() in LOCAL_NAMES or is_loopback(name.strip("[]"))


def _same(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode("latin-1"), wanted.encode("latin-1"))
