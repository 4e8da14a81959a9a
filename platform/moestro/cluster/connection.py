"""`Cluster`: connect to Ray or start it in place, run stages on it, host rollout engines in actors.

A lost worker is Ray's to replace (`max_retries`); the stage then resumes from its scratch. Stages that train are
tasks with cores of their own. Stages that measure share one actor that yields to everything else.
"""

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from moestro.artifacts import Artifact, ArtifactStore, Reporter
from moestro.cluster.board import BoardReporter, forward, start_board
from moestro.cluster.causes import cause_of
from moestro.cluster.claims import claimant
from moestro.cluster.ending import end_group, end_task
from moestro.cluster.engine import EngineHost, RemoteEngine
from moestro.cluster.group import train_together, workers_for
from moestro.cluster.room import check_room
from moestro.config import Resources
from moestro.errors import LostWorkerError, ResourceError, StoppedError, named, noting
from moestro.execution import Step, run_step
from moestro.inference.engine import EngineConfig, EngineFactory
from moestro.interrupts import interrupts_held, terminations_kept
from moestro.stages import STAGES

POLL_SECONDS = 0.5
REACH_SECONDS = 10
STOP_SECONDS = 5
NICENESS = 19
OBJECT_STORE_BYTES = 200 * 1024 * 1024


class Cluster:
    """A Ray cluster: one that is there at `address`, or one started in place with `cpus` cores."""

    def __init__(self, address: str | None = None, *, cpus: int | None = None) -> None:
        self.address = address
        self.cpus = cpus or os.cpu_count() or 1
        self._board: Any = None
        self._background: Any = None
        self._ready = threading.Event()
        self._users = 0
        self._changed = threading.Condition()

    def connect(self, *, workers: int = 0) -> None:
        """Connect, or start Ray. Call it from the main thread, where Ray can handle signals; `run` waits for it.

        In a cluster started here, up to `workers` of its workers import what stages need before they are needed.
        Raises `ResourceError` if there is no cluster at the address, or Ray does not start.
        """
        import ray

        if self.address:
            _reach(self.address)
        own = {} if self.address else {"num_cpus": self.cpus, "object_store_memory": OBJECT_STORE_BYTES}
        try:
            # Ray raises `Exception` itself where its processes take longer to start than it waits for them.
            with interrupts_held(), terminations_kept(), named(lambda error: _no_cluster(self.address, error)):
                ray.init(
                    address=self.address or "local",  # without one Ray would join any cluster it finds on this machine
                    include_dashboard=None if self.address else False,
                    log_to_driver=False,
                    logging_level="ERROR",
                    configure_logging=False,
                    **own,
                )
        except (ConnectionError, ValueError) as error:
            raise _no_cluster(self.address, error) from error
        self._board = start_board()
        self._background = ray.remote(_Background).options(num_cpus=0, max_restarts=-1).remote()
        for _ in range(0 if self.address else min(workers, self.cpus)):
            ray.remote(_import_ahead).options(num_cpus=1).remote()
        self._ready.set()

    def run(
        self, store: ArtifactStore, step: Step, *, resources: Resources, reporter: Reporter, stopped: Callable[[], bool]
    ) -> Artifact:
        """Run `step` on the cluster and return its artifact: a task with `resources.cpus` cores, or, if its stage
        measures, in the background with that many threads.

        Where `resources.branch_workers` is more than one, a stage that trains takes as many such tasks, which train
        together. Raises what the stage raised, or `LostWorkerError` if its workers keep dying. `stopped` is asked
        while waiting; once it says yes the task is cancelled and `StoppedError` raised.
        """
        self._wait(stopped)
        with self.using():
            return self._run(store, step, resources, reporter, stopped)

    def _run(
        self, store: ArtifactStore, step: Step, resources: Resources, reporter: Reporter, stopped: Callable[[], bool]
    ) -> Artifact:
        key = os.urandom(8).hex()
        for retry in range(resources.max_retries + 1):
            reference, workers = self._submit(store, step, resources, key)
            try:
                return self._follow(reference, key, reporter, stopped)
            except BaseException as error:
                with noting(error):
                    self._end(reference, step, workers, key)
                if not isinstance(error, LostWorkerError):
                    raise
                background = STAGES[step.stage].background
                ended = workers == 1 and not background  # Ray itself has begun single workers again
                if ended or retry == resources.max_retries:
                    raise LostWorkerError(
                        f"The worker of {step.stage} died {resources.max_retries + 1} times: {error.message}",
                        hint="Run the same command again: it resumes from the last checkpoint.",
                    ) from error
                if background:
                    self._until_background_answers(stopped)
        raise AssertionError("the last try returns or raises")

    def _end(self, reference: Any, step: Step, workers: int, key: str) -> None:
        """See to it that nothing goes on with what has failed or is no longer wanted."""
        if workers > 1:
            end_group(reference, self._board, key)
        else:  # an actor's call cannot be forced: it ends with the actor, and must not be begun again then
            end_task(reference, force=not STAGES[step.stage].background)

    def _until_background_answers(self, stopped: Callable[[], bool]) -> None:
        """Wait until the process that measures has been started again; raises `StoppedError`."""
        import ray

        while not stopped():
            there = self._background.__ray_ready__.remote()
            try:
                if ray.wait([there], timeout=POLL_SECONDS)[0] and ray.get(there):
                    return
            except ray.exceptions.RayActorError:  # is still starting
                threading.Event().wait(POLL_SECONDS)
        raise StoppedError

    def _follow(self, reference: Any, key: str, reporter: Reporter, stopped: Callable[[], bool]) -> Artifact:
        """Wait for the artifact while reports are passed on; raises `LostWorkerError` if Ray has given it up."""
        import ray

        try:
            while not ray.wait([reference], timeout=POLL_SECONDS)[0]:
                forward(ray.get(self._board.take.remote(key)), reporter)
                if stopped():
                    raise StoppedError
            artifact: Artifact = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise cause_of(error) from None
        except (
            ray.exceptions.WorkerCrashedError,
            ray.exceptions.RayActorError,
            ray.exceptions.NodeDiedError,
            ray.exceptions.OutOfMemoryError,
        ) as error:
            raise LostWorkerError(str(error).splitlines()[0]) from error
        forward(ray.get(self._board.take.remote(key)), reporter)
        return artifact

    def _submit(self, store: ArtifactStore, step: Step, resources: Resources, key: str) -> tuple[Any, int]:
        """The reference of the artifact to come, and how many workers make it.

        Raises `ResourceError` if there are too few cores, `ConfigError` if they cannot share its batches.
        """
        import ray

        arguments = (store.root, step, resources, self._board, key)
        if STAGES[step.stage].background:
            # Ray would spend its retries within moments, while an actor that yields to everybody still starts again.
            return self._background.run.options(max_task_retries=0, name=step.stage).remote(*arguments), 1
        workers = workers_for(step, resources)
        resources = resources.model_copy(update={"cpus": resources.cpus or self.cpus})
        check_room(step.stage, cpus=resources.cpus or 1, workers=workers)
        if workers > 1:
            group = ray.remote(train_together).options(num_cpus=0, max_retries=0, name=f"{step.stage} group")
            return group.remote(store.root, step, resources, self._board, key), workers
        task = ray.remote(_run).options(num_cpus=resources.cpus, max_retries=resources.max_retries, name=step.stage)
        return task.remote(*arguments), 1

    def engine_factory(self, resources: Resources, stopped: Callable[[], bool]) -> EngineFactory:
        """Makes rollout engines that live in a Ray actor and die with it, or with the driver.

        `stopped` is asked while the cluster is not connected yet; once it says yes, `StoppedError` is raised.
        """

        def make(folder: Path, config: EngineConfig) -> RemoteEngine:
            import ray

            self._wait(stopped)
            host = ray.remote(EngineHost).options(num_cpus=resources.cpus or self.cpus, max_restarts=0)
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
        ray.kill(self._background)
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
        return ResourceError(
            f"Ray does not start: {words}.",
            hint="On a busy machine its processes may take longer than it waits: run the same command again when "
            "others are done, or start Ray beforehand and set RAY_ADDRESS.",
        )
    return ResourceError(
        f"There is no Ray cluster at {address}: {words}.", hint="Start it, or unset RAY_ADDRESS to start one in place."
    )


def _import_ahead() -> None:
    """Make this worker one that a stage can start on at once."""
    import_module("moestro.training.loop")


class _Background:
    """The actor in which stages measure, one after the other, on whatever the others leave of the cores."""

    def __init__(self) -> None:
        if hasattr(os, "SCHED_IDLE"):  # Linux
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        else:
            os.nice(NICENESS)

    def run(self, root: Path, step: Step, resources: Resources, board: Any, key: str) -> Artifact:
        """The step, as `_run` does it."""
        return _run(root, step, resources, board, key)


def _run(root: Path, step: Step, resources: Resources, board: Any, key: str) -> Artifact:
    """The Ray task: the step on this worker's machine, under the shared root."""
    import ray

    reporter = BoardReporter(board, key)
    try:
        return run_step(ArtifactStore(root), step, resources=resources, reporter=reporter, claimant=claimant(key))
    finally:
        ray.get(reporter.flush())
