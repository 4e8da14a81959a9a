"""Taking a port and serving an ASGI application on it, in a thread of this process."""

import errno
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from moestro.errors import BusyError, ConfigError, ResourceError

GRACE_SECONDS = 5
START_SECONDS = 60
KEEP_ALIVE_SECONDS = 65
"""How long an idle client's connection stays open: longer than clients keep one, so that none sends into its end."""


def listen(host: str, port: int, *, option: str = "--port") -> socket.socket:
    """A listening socket at `host`:`port` (0: any free port); `option` is what the user chooses the port with.

    Raises `BusyError` if the port is in use, `ConfigError` if this machine has no such address or may not have it.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, OverflowError) as error:
        raise ConfigError(f"{host}:{port} is not an address ({error}).") from None
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(2048)
    except OSError as error:
        made.close()
        if error.errno == errno.EADDRINUSE:
            raise BusyError(f"Port {port} on {host} is in use.", hint=f"Choose another with {option}.") from None
        raise ConfigError(f"{host}:{port} cannot be bound ({error.strerror}).") from None
    return made


def address(made: socket.socket) -> str:
    """The URL under which `made` is reached from this machine."""
    host, port = made.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """Tells when it has started."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.up = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self.up.set()


@contextmanager
def serving(app: Any, made: socket.socket, http: Any = "auto") -> Iterator[str]:
    """Serve `app` on the socket while in the block; yields the URL. Running answers get a few seconds to finish.

    `http` is uvicorn's setting: what makes the protocol of a connection.
    """
    config = uvicorn.Config(
        app,
        http=http,
        log_level="critical",
        access_log=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        server_header=False,
    )
    server = _Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [made]}, name="gateway", daemon=True)
    url = address(made)
    thread.start()
    try:
        if not server.up.wait(START_SECONDS):
            raise ResourceError(f"The web server at {url} did not start within {START_SECONDS} s.")
        yield url
    finally:
        server.should_exit = True
        thread.join()
        made.close()
