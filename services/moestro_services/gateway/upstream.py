"""Asking model servers: aiohttp, one pool of connections for every start of every server."""

import io
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import aiohttp
from yarl import URL

from moestro_services.gateway.replica import Endpoint

CONNECT_SECONDS = 5
HEALTH_SECONDS = 5
KEEP_ALIVE_SECONDS = 30
"""Less than `moestro.inference.server.KEEP_ALIVE_SECONDS`: a connection is dropped here before the server does."""
LARGE_BODY = 1 << 20

LOST = (aiohttp.ClientError, OSError, TimeoutError)
"""What is raised when a server cannot be reached, or is lost while it answers."""


class Upstream:
    """The client of all model servers, to be opened and used in one event loop."""

    def __init__(self, current: Callable[[], Iterable[Endpoint]]) -> None:
        """`current` are the endpoints that still answer; the connections to others are closed."""
        self._current = current
        self._sessions: dict[Endpoint, aiohttp.ClientSession] = {}

    async def post(
        self, endpoint: Endpoint, path: str, body: bytes, headers: Mapping[str, str]
    ) -> aiohttp.ClientResponse:
        """Send `body` and return when the answer's head is there; the caller closes it. Raises `LOST`."""
        session = self._sessions.get(endpoint) or await self._opened(endpoint)
        data: Any = body if len(body) < LARGE_BODY else io.BytesIO(body)
        url = URL(endpoint.url + path, encoded=True)
        return await session.post(url, data=data, headers=headers, allow_redirects=False)

    async def healthy(self, endpoint: Endpoint) -> bool:
        """Whether the server says that it and its engine are well."""
        session = self._sessions.get(endpoint) or await self._opened(endpoint)
        timeout = aiohttp.ClientTimeout(total=HEALTH_SECONDS)
        try:
            async with session.get(URL(endpoint.url + "/health", encoded=True), timeout=timeout) as answer:
                return answer.status == 200
        except LOST:
            return False

    async def __aenter__(self) -> "Upstream":
        """The client."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close all connections."""
        for session in self._sessions.values():
            await session.close()
        self._sessions.clear()

    async def _opened(self, endpoint: Endpoint) -> aiohttp.ClientSession:
        current = set(self._current())
        gone = [self._sessions.pop(old) for old in list(self._sessions) if old not in current]
        session = self._sessions[endpoint] = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS, use_dns_cache=False),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
            headers={"Authorization": f"Bearer {endpoint.api_key}", "Accept-Encoding": "identity"},
            skip_auto_headers=("User-Agent", "Content-Type"),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
        )
        for old in gone:
            await old.close()
        return session
