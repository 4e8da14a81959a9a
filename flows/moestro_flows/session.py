"""`Session`: one run of a lifecycle; brings store, cluster, MLflow and registry together around each step."""

import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from moestro.artifacts import Artifact, LifecycleRun, Record, StepRun, exclusive
from moestro.cluster import Cluster
from moestro.config import LifecycleConfig, Resources
from moestro.errors import ResourceError, StoppedError, noting, told
from moestro.execution import Step, run_step
from moestro.stages import STAGES
from moestro_flows.events import LISTENER, Listener
from moestro_flows.home import Home
from moestro_flows.plan import Plan
from moestro_flows.preflight import check_text, preflight
from moestro_flows.server import end_orphans
from moestro_flows.tracking import TrackedStep, Tracking

MIN_FREE_BYTES = 500_000_000


@dataclass
class Session:
    """A running lifecycle. Steps may be performed from several threads."""

    home: Home
    config: LifecycleConfig
    run: LifecycleRun
    cluster: Cluster
    tracking: Tracking
    listener: Listener
    needs_cluster: bool
    to_run: frozenset[str]
    """Names of the steps that were not there when the run began."""
    failure: BaseException | None = None
    _started: float = field(default_factory=time.monotonic)
    _stopped: threading.Event = field(default_factory=threading.Event)
    _record: threading.Lock = field(default_factory=threading.Lock)
    _local: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    @contextmanager
    def open(cls, home: Home, config: LifecycleConfig) -> Iterator["Session"]:
        """Check the inputs, take the home for this run and begin it; close everything at the end, whatever happened.

        Raises `BusyError` if another run has the home, `InputError` for material that is missing.
        """
        home.prepare()
        with exclusive(home.lock, what=f"The home {home.path}"):
            check_disk(home)
            end_orphans(home)
            plan = Plan.of(config, home.store)
            if any(step.action == "run" for step in plan.steps):
                preflight(config)
            now = datetime.now(UTC)
            run = LifecycleRun(
                id=f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}",
                name=config.name,
                status="running",
                config=config.model_dump(mode="json"),
                started_at=now,
            )
            tracking = Tracking.open(home, run, [(step.name, step.action) for step in plan.steps])
            run = run.model_copy(update={"mlflow_run_id": tracking.run_id})
            cluster = Cluster(home.ray_address, cpus=config.resources.cpus)
            needs_cluster = any(step.action == "run" and _on_ray(step.stage) for step in plan.steps)
            to_run = frozenset(step.name for step in plan.steps if step.action == "run")
            session = cls(home, config, run, cluster, tracking, LISTENER.get(), needs_cluster, to_run)
            session.listener.planned(run, [step.name for step in plan.steps])
            run.write(home.runs)
            try:
                yield session
            except BaseException as error:
                try:
                    with noting(error):
                        session._end("failed" if isinstance(error, Exception) else "cancelled")  # else: Ctrl-C, SIGTERM
                finally:
                    with noting(error):
                        session.close()
                raise
            session.close()

    def perform(self, name: str, step: Step, *, text: Mapping[str, Artifact] | None = None) -> tuple[StepRun, Artifact]:
        """Run one step, or reuse its artifact, and write down what happened.

        Before a step that is given the domains' tokens as `text` runs, they have to suffice for all that will train.
        """
        if self._stopped.is_set():
            raise StoppedError
        begun, started_at = time.monotonic(), datetime.now(UTC)
        self.listener.started(name)
        fingerprint, mlflow_run_id = step.identity(step.roles()), ""
        try:
            found = self.home.store.find(step.stage, fingerprint)
            with self.tracking.step(name, step, fingerprint, reused=found is not None) as tracked:
                mlflow_run_id = tracked.run_id
                if text and not found:
                    check_text(self.config, text, self.to_run)
                artifact = found or self._make(name, step, tracked)
                record = artifact.record
                tracked.finish(artifact, record)
                self.tracking.note(name, artifact, record)
        except BaseException as error:
            self._fail(error)
            with noting(error):
                self._note(name, step.stage, fingerprint, started_at, begun, mlflow_run_id, error=error)
            raise
        done = self._note(
            name, step.stage, fingerprint, started_at, begun, mlflow_run_id, reused=found is not None, record=record
        )
        return done, artifact

    def finish(self) -> LifecycleRun:
        """The run is complete: write it down, draw its figures, register its model."""
        self._end("completed")
        return self.run

    def _make(self, name: str, step: Step, tracked: TrackedStep) -> Artifact:
        reporter = _StepReporter(name, self.listener, tracked, self._stopped)
        if STAGES[step.stage].on_cluster or STAGES[step.stage].background:
            resources = self._share(self._cores_on_cluster(step.stage))
            return self.cluster.run(
                self.home.store, step, resources=resources, reporter=reporter, stopped=self._stopped.is_set
            )
        resources = self._share(None)
        extras = (
            {"engine": self.cluster.engine_factory(resources, self._stopped.is_set)}
            if STAGES[step.stage].needs_engine
            else {}
        )
        with self._local:
            if self._stopped.is_set():
                raise StoppedError
            return run_step(self.home.store, step, resources=resources, reporter=reporter, extras=extras)

    def _cores_on_cluster(self, stage: str) -> int | None:
        if STAGES[stage].background:
            return max(1, self.cluster.cpus // 2)
        resources = self.config.resources
        return resources.branch_cpus if stage == "branch" else max(1, self.cluster.cpus // resources.branch_workers)

    def _share(self, cpus: int | None) -> Resources:
        return self.config.resources.model_copy(update={"cpus": cpus or self.cluster.cpus})

    def _note(
        self,
        name: str,
        stage: str,
        fingerprint: str,
        started_at: datetime,
        begun: float,
        mlflow_run_id: str,
        *,
        reused: bool = False,
        record: Record | None = None,
        error: BaseException | None = None,
    ) -> StepRun:
        stopped = self._stopped.is_set() and error is not self.failure
        step = StepRun(
            name=name,
            stage=stage,
            fingerprint=fingerprint,
            status="cancelled" if stopped else "failed" if error else "completed",
            reused=reused,
            started_at=started_at,
            seconds=time.monotonic() - begun,
            message=told(error) if error else "",
            mlflow_run_id=mlflow_run_id,
        )
        with self._record:
            self.run = self.run.model_copy(update={"steps": (*self.run.steps, step)})
            self.run.write(self.home.runs)
        self.listener.ended(step, record)
        return step

    def _fail(self, error: BaseException) -> None:
        """Remember the first error and stop the other steps: their work is kept, and the user hears at once."""
        with self._record:
            if self.failure is None and not self._stopped.is_set():
                self.failure = error
        self._stopped.set()

    def close(self) -> None:
        """No step goes on after its next report, and the cluster is left. Called again it does nothing."""
        self._stopped.set()
        self.cluster.shutdown()

    def _end(self, status: Any) -> None:
        with self._record:
            if self.run.status != "running":
                return
            self.run = self.run.model_copy(update={"status": status, "seconds": time.monotonic() - self._started})
            self.run.write(self.home.runs)
        deploy = self.config.deploy
        self.tracking.finish(self.run, model_name=deploy.name if deploy else None)


def _on_ray(stage: str) -> bool:
    return STAGES[stage].on_cluster or STAGES[stage].background or STAGES[stage].needs_engine


class _StepReporter:
    """Passes what a stage reports to the listener and to MLflow; a stopped session interrupts the stage here."""

    def __init__(self, name: str, listener: Listener, tracked: TrackedStep, stopped: threading.Event) -> None:
        self.name = name
        self.listener = listener
        self.tracked = tracked
        self.stopped = stopped

    def progress(self, done: int, total: int, message: str = "") -> None:
        if self.stopped.is_set():
            raise StoppedError
        self.listener.progress(self.name, done, total, message)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.listener.metrics(self.name, values, step)
        self.tracked.metrics(values, step)


def check_disk(home: Home) -> None:
    """Raise `ResourceError` if the home's disk is nearly full."""
    free = shutil.disk_usage(home.path).free
    if free < MIN_FREE_BYTES:
        raise ResourceError(
            f"Only {free / 1e6:.0f} MB are free on the disk of {home.path}; a run needs {MIN_FREE_BYTES / 1e6:.0f} MB.",
            hint="Free some, or point MOESTRO_HOME elsewhere.",
        )
