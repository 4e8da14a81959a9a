"""Ray: connect to a cluster or start one in place, run stages as tasks on it, host rollout engines in actors.

A lost worker is Ray's to replace (`max_retries`); the stage then resumes from its scratch. What a stage reports
travels through one small actor, the board, that the driver empties while it waits.
"""

import os
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from moestro.artifacts import Artifact, ArtifactStore, Reporter
from moestro.config import Resources
from moestro.errors import MoestroError, ResourceError, StoppedError
from moestro.execution import Step, run_step
from moestro.inference.engine import EngineConfig, EngineFactory
from moestro.interrupts import interrupts_held, terminations_kept

POLL_SECONDS = 0.5
REACH_SECONDS = 10
STOP_SECONDS = 5
OBJECT_STORE_BYTES = 200 * 1024 * 1024


class Cluster:
    """A Ray cluster: one that is there at `address`, or one started in place with `cpus` cores."""

    def __init__(self, address: str | None = None, *, cpus: int | None = None) -> None:
        self.address = address
        self.cpus = cpus or os.cpu_count() or 1
        self._board: Any = None
        self._ready = threading.Event()
        self._users = 0
        self._changed = threading.Condition()

    def connect(self) -> None:
        """Connect, or start Ray. Call it from the main thread, where Ray can handle signals; `run` waits for it.

        Raises `ResourceError` if there is no cluster at the address.
        """
        import ray

        if self.address:
            _reach(self.address)
        own = {} if self.address else {"num_cpus": self.cpus, "object_store_memory": OBJECT_STORE_BYTES}
        try:
            with interrupts_held(), terminations_kept():
                ray.init(
                    address=self.address,
                    include_dashboard=None if self.address else False,
                    log_to_driver=False,
                    logging_level="ERROR",
                    configure_logging=False,
                    **own,
                )
        except (ConnectionError, ValueError) as error:
            raise _no_cluster(self.address, error) from error
        self._board = ray.remote(_Board).options(num_cpus=0).remote()
        self._ready.set()

    def run(
        self, store: ArtifactStore, step: Step, *, resources: Resources, reporter: Reporter, stopped: Callable[[], bool]
    ) -> Artifact:
        """Run `step` as a Ray task with `resources.cpus` cores and return its artifact.

        Raises what the stage raised, or `ResourceError` if its workers keep dying. `stopped` is asked while waiting;
        once it says yes the task is cancelled and `StoppedError` raised.
        """
        self._wait(stopped)
        with self.using():
            return self._run(store, step, resources, reporter, stopped)

    def _run(
        self, store: ArtifactStore, step: Step, resources: Resources, reporter: Reporter, stopped: Callable[[], bool]
    ) -> Artifact:
        import ray

        board = self._board
        cpus = resources.cpus or self.cpus
        if cpus > (available := int(ray.cluster_resources().get("CPU", 0))):
            raise ResourceError(f"{step.stage} asks for {cpus} cores, the cluster has {available}.")
        key = os.urandom(8).hex()
        task = ray.remote(_run).options(num_cpus=cpus, max_retries=resources.max_retries, name=step.stage)
        reference = task.remote(store.root, step, resources, board, key)
        try:
            while not ray.wait([reference], timeout=POLL_SECONDS)[0]:
                _forward(ray.get(board.take.remote(key)), reporter)
                if stopped():
                    ray.cancel(reference, force=True)
                    raise StoppedError
            artifact: Artifact = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, MoestroError):
                raise error.cause from None
            raise
        except (
            ray.exceptions.WorkerCrashedError,
            ray.exceptions.NodeDiedError,
            ray.exceptions.OutOfMemoryError,
        ) as error:
            raise ResourceError(
                f"The worker of {step.stage} died {resources.max_retries + 1} times: {error}".splitlines()[0],
                hint="Run the same command again: it resumes from the last checkpoint.",
            ) from error
        _forward(ray.get(board.take.remote(key)), reporter)
        return artifact

    def engine_factory(self, resources: Resources, stopped: Callable[[], bool]) -> EngineFactory:
        """Makes rollout engines that live in a Ray actor and die with it, or with the driver.

        `stopped` is asked while the cluster is not connected yet; once it says yes, `StoppedError` is raised.
        """

        def make(folder: Path, config: EngineConfig) -> "RemoteEngine":
            import ray

            self._wait(stopped)
            host = ray.remote(_EngineHost).options(num_cpus=resources.cpus or self.cpus, max_restarts=0)
            return RemoteEngine(self, host.remote(folder, config))

        return make

    def _wait(self, stopped: Callable[[], bool]) -> None:
        """Wait until `connect` has been called and is done: it may fail, and then nobody else would say so."""
        while not self._ready.wait(POLL_SECONDS):
            if stopped():
                raise StoppedError

    @contextmanager
    def using(self) -> Iterator[None]:
        """Ray is not shut down while in the block; raises `StoppedError` if it has been."""
        with self._changed:
            if not self._ready.is_set():
                raise StoppedError
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    def shutdown(self) -> None:
        """Leave the cluster; one started here ends with all its processes. Calls told to stop get a moment."""
        if not self._ready.is_set():
            return
        import ray

        with self._changed:
            self._ready.clear()
            self._changed.wait_for(lambda: self._users == 0, timeout=STOP_SECONDS)
        ray.shutdown()


def _reach(address: str) -> None:
    """Raise `ResourceError` at once where Ray would try for minutes; `auto` and `ray://` are left to Ray."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "://" not in host:
        try:
            socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise _no_cluster(address, error) from None


def _no_cluster(address: str | None, error: Exception) -> ResourceError:
    words = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    if address is None:
        return ResourceError(f"Ray does not start: {words}.")
    return ResourceError(
        f"There is no Ray cluster at {address}: {words}.", hint="Start it, or unset RAY_ADDRESS to start one in place."
    )


class RemoteEngine:
    """An `inference.engine.Engine` whose work is done in a Ray actor."""

    def __init__(self, cluster: Cluster, host: Any) -> None:
        self._cluster = cluster
        self._host = host

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            import ray

            try:
                with self._cluster.using():
                    return ray.get(self._host.call.remote(method, args, kwargs))
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, MoestroError):
                    raise error.cause from None
                raise
            except ray.exceptions.RayActorError as error:
                # Ray's first lines say which actor, the last one why.
                raise ResourceError(
                    f"The rollout engine died: {str(error).strip().splitlines()[-1]}",
                    hint="Run the same command again: it resumes from the last update.",
                ) from error

        return call

    def close(self) -> None:
        """End the actor and the engine in it, whether or not it still lives."""
        import ray

        with suppress(StoppedError), self._cluster.using():
            ray.kill(self._host)


class _EngineHost:
    """The actor around a vLLM engine."""

    def __init__(self, folder: Path, config: EngineConfig) -> None:
        from moestro.inference.engine import VllmEngine

        self.engine = VllmEngine(folder, config)

    def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return getattr(self.engine, method)(*args, **kwargs)


class _Board:
    """The actor that holds what stages report until their driver takes it."""

    def __init__(self) -> None:
        self.events: defaultdict[str, list[tuple[Any, ...]]] = defaultdict(list)

    def put(self, key: str, events: list[tuple[Any, ...]]) -> None:
        self.events[key].extend(events)

    def take(self, key: str) -> list[tuple[Any, ...]]:
        return self.events.pop(key, [])


class _BoardReporter:
    """The worker's end of the board: sends at most twice a second."""

    def __init__(self, board: Any, key: str) -> None:
        self.board = board
        self.key = key
        self.buffer: list[tuple[Any, ...]] = []
        self.sent = 0.0

    def progress(self, done: int, total: int, message: str = "") -> None:
        self.buffer = [event for event in self.buffer if event[0] != "progress"]
        self._add(("progress", done, total, message))

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self._add(("metrics", dict(values), step))

    def _add(self, event: tuple[Any, ...]) -> None:
        self.buffer.append(event)
        if time.monotonic() - self.sent > POLL_SECONDS:
            self.flush()

    def flush(self) -> Any:
        sent = self.board.put.remote(self.key, self.buffer)
        self.buffer = []
        self.sent = time.monotonic()
        return sent


def _run(root: Path, step: Step, resources: Resources, board: Any, key: str) -> Artifact:
    """The Ray task: the step on this worker's machine, under the shared root."""
    import ray

    reporter = _BoardReporter(board, key)
    try:
        return run_step(ArtifactStore(root), step, resources=resources, reporter=reporter)
    finally:
        ray.get(reporter.flush())


def _forward(events: list[tuple[Any, ...]], reporter: Reporter) -> None:
    for kind, *arguments in events:
        getattr(reporter, kind)(*arguments)
