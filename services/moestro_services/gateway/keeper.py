"""`Keeper`: starts a model server and starts it again when it is lost."""

import threading
from collections.abc import Callable
from typing import Protocol

from moestro.errors import ResourceError
from moestro_services.gateway.deployments import ModelServer

CHECK_SECONDS = 3.0
MISSES = 3
MAX_RESTARTS = 3
JOIN_SECONDS = 2.0


class StartableServer(ModelServer, Protocol):
    """A model server that can be started and stopped, such as `VllmServer`."""

    def start(self, timeout: float = ...) -> None:
        """Start and wait until it answers; raises `ResourceError` if it does not."""

    def stop(self) -> None:
        """End it."""


class Keeper:
    """Watches one server. `gave_up` is set when it was lost more often than it is worth starting again."""

    def __init__(
        self, server: StartableServer, *, say: Callable[[str], None], check_seconds: float = CHECK_SECONDS
    ) -> None:
        self.server = server
        self.gave_up = threading.Event()
        self.restarts = 0
        self._say = say
        self._check_seconds = check_seconds
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="keeper", daemon=True)

    def __enter__(self) -> "Keeper":
        """Start the server, wait until it answers, and watch it from then on."""
        self.server.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching and end the server.

        One that is just being started again is left to the end of this process, which ends it too.
        """
        self._stopping.set()
        self._thread.join(JOIN_SECONDS + self._check_seconds)
        if not self._thread.is_alive():
            self.server.stop()

    def _watch(self) -> None:
        misses = 0
        while not self._stopping.wait(self._check_seconds):
            misses = 0 if self.server.healthy() else misses + 1
            if misses < MISSES:
                continue
            if not self._again():
                self.gave_up.set()
                return
            misses = 0

    def _again(self) -> bool:
        """Start the server again; whether it answers now."""
        while self.restarts < MAX_RESTARTS and not self._stopping.is_set():
            self.restarts += 1
            self._say(f"The model's server is lost; starting it again ({self.restarts} of {MAX_RESTARTS} times).")
            self.server.stop()
            try:
                self.server.start()
            except ResourceError as error:
                self._say(error.message.splitlines()[0])
            else:
                self._say("The model's server answers again.")
                return True
        return False
