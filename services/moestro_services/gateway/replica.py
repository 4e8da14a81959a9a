"""`Replica`: one version of a model with the vLLM process that answers for it, kept alive until it is no longer wanted.

A thread of its own opens the version, starts the process, waits for its end and starts it again, ever less often while
that does not help. The event loop only calls `enter` and `leave`, which never wait.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from moestro.errors import MoestroError, told
from moestro.registry.model_versions import ModelVersion
from moestro_services.gateway.deployments import Deployment, ModelServer

CHECK_SECONDS = 5.0
MISSES = 6
JOIN_SECONDS = 0.5

Opener = Callable[[ModelVersion], tuple[Deployment, ModelServer]]
"""Finds what a version consists of; raises `MoestroError` if it is not there. Called in the replica's thread, anew for
every start, so that nothing is served that is no longer what was published."""


class State(StrEnum):
    """How a replica stands."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"
    LOST = "lost"


@dataclass(frozen=True)
class Endpoint:
    """Where one start of a replica's process answers. Every start has another address and another key."""

    url: str
    api_key: str
    start: int


@dataclass(frozen=True)
class Backoff:
    """How long to wait before a lost process is started again, in seconds."""

    first: float = 1.0
    factor: float = 2.0
    longest: float = 60.0
    settled: float = 300.0
    """After serving for so long a loss counts as the first one again."""

    def delay(self, losses: int) -> float:
        """Seconds to wait after so many losses in a row."""
        return min(self.first * self.factor ** min(losses - 1, 60), self.longest)


class Replica:
    """One version, from opening it to the end of its process."""

    def __init__(
        self,
        version: ModelVersion,
        opener: Opener,
        *,
        changed: Callable[[], None],
        backoff: Backoff,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[threading.Event, float], bool] = threading.Event.wait,
        check_seconds: float = CHECK_SECONDS,
    ) -> None:
        """`changed` is called, in any thread, whenever `state` is another; `pause` waits so many seconds or until
        the event is set, and says whether it is."""
        self.version = version
        self.deployment: Deployment | None = None
        """What is served, once it was found."""
        self.in_flight = 0
        self.restarts = 0
        self.reason = ""
        """Why it is lost."""
        self._opener = opener
        self._changed = changed
        self._backoff = backoff
        self._clock = clock
        self._pause = pause
        self._check_seconds = check_seconds
        self._server: ModelServer | None = None
        self._endpoint: Endpoint | None = None
        self._alive = State.STARTING
        self._draining = False
        self._ending = threading.Event()
        self._lock = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"replica {self.label}", daemon=True)
        self._thread.start()

    @property
    def label(self) -> str:
        """`name@version`."""
        return f"{self.version.name}@{self.version.version}"

    @property
    def state(self) -> State:
        """How it stands."""
        return State.DRAINING if self._draining else self._alive

    @property
    def serving(self) -> bool:
        """Whether requests may be sent to it now."""
        return self._endpoint is not None and not self._draining

    @property
    def endpoint(self) -> Endpoint | None:
        """Where it answers, while it does."""
        return self._endpoint

    @property
    def port(self) -> int:
        """Where its process listens; 0 without one."""
        return self._server.port if self._server and self._endpoint else 0

    def enter(self) -> Endpoint | None:
        """Count a request and say where to send it, or None if it is not serving. `leave` must follow."""
        with self._lock:
            if self._endpoint is None or self._draining:
                return None
            self.in_flight += 1
            return self._endpoint

    def leave(self) -> None:
        """A request that entered is over."""
        with self._lock:
            self.in_flight -= 1
            if not self.in_flight:
                self._lock.notify_all()

    def fail(self, endpoint: Endpoint, reason: str) -> None:
        """The process behind `endpoint` runs but does not answer as it should: end it, so that it starts again.

        Does not wait. Does nothing if the replica has another endpoint by now.
        """
        with self._lock:
            if self._endpoint != endpoint:
                return
            self._endpoint = None
            self._alive, self.reason = State.LOST, reason
        assert self._server is not None
        threading.Thread(target=self._server.stop, name=f"stop {self.label}", daemon=True).start()

    def retire(self, seconds: float) -> bool:
        """Take no more requests, wait until those it has are over, at most `seconds`, and end.

        Returns False if `resume` was called meanwhile.
        """
        with self._lock:
            self._draining = True
            self._lock.wait_for(lambda: not self.in_flight or not self._draining, seconds)
            if not self._draining:
                return False
            self._ending.set()
        self._end()
        return True

    def resume(self) -> bool:
        """Take requests again while draining; whether it was not too late for that."""
        with self._lock:
            if self._ending.is_set():
                return False
            self._draining = False
            self._lock.notify_all()
            return True

    def _end(self) -> None:
        """End the process and the thread that would start it again."""
        while self._thread.is_alive():
            if self._server is not None:
                self._server.stop()
            self._thread.join(JOIN_SECONDS)

    def _run(self) -> None:
        losses = 0
        while not self._ending.is_set():
            self._become(State.STARTING)
            began = self._clock()
            self._live()
            if self._ending.is_set():
                return
            losses = 1 if self._clock() - began >= self._backoff.settled else losses + 1
            if self._pause(self._ending, self._backoff.delay(losses)):
                return
            self.restarts += 1

    def _live(self) -> None:
        """One start of the process, until it is lost or the replica ends."""
        try:
            self.deployment, server = self._opener(self.version)
            self._server = server
            server.start()
        except (MoestroError, OSError) as error:
            self._become(State.LOST, reason=told(error).partition("\n")[0])
            return
        if not self._ending.is_set():
            self._become(State.SERVING, Endpoint(server.url, server.api_key, self.restarts))
            self._become(State.LOST, reason=self._until_lost(server))
        server.stop()

    def _until_lost(self, server: ModelServer) -> str:
        """Wait for the process' end; one that runs without answering counts as ended after a while."""
        misses = 0
        while not server.wait(self._check_seconds):
            misses = 0 if server.healthy() else misses + 1
            if misses >= MISSES:
                return "The process runs but does not answer."
        return "The process ended."

    def _become(self, state: State, endpoint: Endpoint | None = None, *, reason: str = "") -> None:
        with self._lock:
            if state is State.LOST and self._alive is State.LOST:
                reason = self.reason  # `fail` knew better
            self._alive, self._endpoint, self.reason = state, endpoint, reason
        self._changed()
