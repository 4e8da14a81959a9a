"""What a request must show before it is let in, told from its method, path and headers alone.

Scopes are decided on the path that the router matches, decoded once, and by its first segment: what lies under /api
is never taken for what lies under /v1. What is not in the table wants a key, whatever its scopes.

Without keys, on loopback, the Host header must name this machine, and so must the Origin that a browser names for a
page that changes something: otherwise a web page in a browser here could reach the gateway through a name of its own
(DNS rebinding) or send it requests of its own (forgery).
"""

import ipaddress
import re
from collections.abc import Sequence
from enum import StrEnum
from urllib.parse import urlsplit

from starlette.types import Scope as AsgiScope

from moestro.errors import ConfigError
from moestro_services.gateway.caller import Scope
from moestro_services.gateway.keys import SECRET, KeyRing

LOCAL_NAMES = {"localhost", "127.0.0.1", "[::1]"}
OPEN_PATHS = {"/health", "/ready"}
READING = {"GET", "HEAD"}
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]@/]*)(?::\d{0,5})?")
_DECIMAL = re.compile(r"\d{1,18}")
_UNPLAIN = re.compile(r"//|[\x00-\x1f\x7f\\]|/\.{1,2}(?:/|$)")
"""What no path has that a route of the gateway could match."""


class Reason(StrEnum):
    """Why a request was refused, for those who count."""

    MALFORMED = "malformed"
    HOST = "host"
    ORIGIN = "origin"
    NO_KEY = "no_key"
    WRONG_KEY = "wrong_key"
    REVOKED_KEY = "revoked_key"
    SCOPE = "scope"
    KEYS = "keys_unreadable"
    REQUESTS = "requests_per_minute"
    TOKENS = "tokens_per_minute"
    CONCURRENCY = "concurrent_requests"
    BODY_SIZE = "max_body_bytes"
    BODY_TIME = "body_seconds"
    TIME = "request_seconds"
    HEAD_SIZE = "head_bytes"
    HEAD_TIME = "head_seconds"


class RefusedError(Exception):
    """A request is not let in, or not answered any longer."""

    def __init__(self, status: int, reason: Reason, message: str, *, code: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.message = message
        self.code = code
        """As OpenAI's clients know it."""
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Need(StrEnum):
    """What a path wants where it is no scope."""

    NOTHING = "nothing"
    ANY_KEY = "any key"


def malformed(message: str) -> RefusedError:
    """A request that is no proper HTTP request."""
    return RefusedError(400, Reason.MALFORMED, message, code="invalid_request", connection="close")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposure(host: str, keys: KeyRing | None) -> None:
    """Raise `ConfigError` if `host` can be reached from other machines and no key is asked for, or there is none."""
    if is_loopback(host):
        return
    if keys is None:
        raise ConfigError(
            f"{host} can be reached from other machines, where requests have to bear a key.",
            hint="Leave out --no-auth, which is for this machine alone, or bind 127.0.0.1.",
        )
    if not any(key.live for key in keys.list()):
        raise ConfigError(
            f"{host} can be reached from other machines, and there is no API key.",
            hint="Make one with `moestro keys create NAME`, or bind 127.0.0.1.",
        )


def needed(method: str, path: str) -> Scope | Need:
    """What a request for `path` (as the router sees it) wants."""
    if path in OPEN_PATHS and method in READING:
        return Need.NOTHING
    first = path.split("/", 2)[1]
    if first == "v1":
        return Scope.INFER
    if first == "api":
        return Scope.READ if method in READING else Scope.ADMIN
    return Scope.READ if path == "/metrics" else Need.ANY_KEY


def routed_path(scope: AsgiScope) -> str:
    """The path that the router matches; raises `RefusedError` if it is not in its plain form."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if root and path.startswith(root) and path[len(root) : len(root) + 1] in ("", "/"):
        path = path[len(root) :]
    if not path.startswith("/") or _UNPLAIN.search(path):
        raise malformed("The path is not in its plain form.")
    return path


class Headers:
    """The headers that decide, each at most once."""

    def __init__(self, raw: Sequence[tuple[bytes, bytes]]) -> None:
        self._raw = raw

    def one(self, name: bytes) -> str | None:
        """The header's value, None without it; raises `RefusedError` if it is given more than once."""
        found = [value for given, value in self._raw if given == name]
        if len(found) > 1:
            raise malformed(f"The header {name.decode()} is given more than once.")
        return found[0].decode("latin-1") if found else None

    def body_length(self) -> int | None:
        """Bytes of the body that follows, None if they are not told. Raises `RefusedError` for framing that two
        servers could read differently."""
        length, encoding = self.one(b"content-length"), self.one(b"transfer-encoding")
        if encoding is not None:
            if length is not None:
                raise malformed("Content-Length and Transfer-Encoding exclude each other.")
            if encoding.strip().lower() != "chunked":
                raise malformed("The only Transfer-Encoding is chunked.")
            return None
        if length is None:
            return 0
        if not _DECIMAL.fullmatch(length):
            raise malformed("Content-Length is not a number of bytes.")
        return int(length)

    def secret(self) -> str:
        """The API key that the request bears; raises `RefusedError` if it bears none."""
        given = self.one(b"authorization")
        if given is None:
            raise _unauthenticated(Reason.NO_KEY, "The request bears no API key (Authorization: Bearer KEY).")
        scheme, _, secret = given.partition(" ")
        if scheme.lower() != "bearer" or not SECRET.fullmatch(secret.strip(" ")):
            raise wrong_key()
        return secret.strip(" ")

    def check_local(self, method: str) -> None:
        """Raise `RefusedError` unless the request comes from a program or page of this machine."""
        if not names_this_machine(self.one(b"host") or ""):
            raise RefusedError(400, Reason.HOST, "The Host header names another machine.", code="invalid_request")
        origin = self.one(b"origin")
        if origin is not None and method not in READING and not _local_origin(origin):
            raise RefusedError(403, Reason.ORIGIN, "The request is another site's.", code="forbidden")


def _unauthenticated(reason: Reason, message: str) -> RefusedError:
    return RefusedError(401, reason, message, code="invalid_api_key", www_authenticate="Bearer")


def wrong_key() -> RefusedError:
    """The request bears no key of ours."""
    return _unauthenticated(Reason.WRONG_KEY, "Incorrect API key.")


def revoked_key() -> RefusedError:
    """The request bears a key that opens nothing any more."""
    return _unauthenticated(Reason.REVOKED_KEY, "The API key was revoked.")


def names_this_machine(host: str) -> bool:
    """Whether a Host header means this machine, by whatever port."""
    parts = _HOST.fullmatch(host)
    if parts is None:
        return False
    name = parts[1].lower()
    return name in LOCAL_NAMES or is_loopback(name.strip("[]"))


def _local_origin(origin: str) -> bool:
    try:
        return names_this_machine(urlsplit(origin).netloc)
    except ValueError:
        return False
