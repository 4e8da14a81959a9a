"""`Tracking`: a lifecycle run in MLflow and in the registry, both of them indexes over what the records say.

One parent run in MLflow per lifecycle run, and a nested one for each step that does work; reused steps keep the run
of the time when they were made.
"""

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moestro import figures
from moestro.artifacts import Artifact, LifecycleRun, Record, read_runs
from moestro.errors import StoppedError, noting, told
from moestro.execution import Step
from moestro.registry import ModelRegistry, Registry, TrackedRun, Tracker, connect
from moestro_flows.home import Home

EXPERIMENT = "moestro"


class TrackedStep:
    """One step: metrics go to MLflow, the artifact to MLflow and the registry. A reused step has no run id."""

    def __init__(self, run: TrackedRun | None, registry: Registry, lock: threading.Lock) -> None:
        self._run = run
        self._registry = registry
        self._lock = lock
        self.run_id = run.id if run else ""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Named figures at a step."""
        if self._run:
            with self._lock:
                self._run.metrics(values, step)

    def finish(self, artifact: Artifact, record: Record) -> None:
        """Index the artifact; write its record, final figures and plots to its MLflow run."""
        with self._lock:
            self._registry.index_artifact(artifact.path, record)
            if self._run:
                self._run.log_record(record)
                for name, figure in step_figures(artifact, self._registry).items():
                    self._run.log_figure(name, figure)


class Tracking:
    """The indexes of one lifecycle run."""

    def __init__(self, tracker: Tracker, models: ModelRegistry, registry: Registry, run: TrackedRun) -> None:
        self._tracker = tracker
        self._models = models
        self._registry = registry
        self._run = run
        self._lock = threading.Lock()
        self._deployment: Artifact | None = None
        self._evaluations: dict[str, dict[str, float]] = {}
        self.run_id = run.id

    @classmethod
    def open(cls, home: Home, run: LifecycleRun, steps: Sequence[tuple[str, str]]) -> "Tracking":
        """Prepare the databases and start the parent run. `steps` are the planned steps' names and actions."""
        registry = connect(home.database_url)
        tracker = Tracker(home.mlflow_uri, home.mlflow_files)
        tracker.prepare()
        tracker.reconcile()
        tags = {"moestro.run": run.id}
        tracked = tracker.start(run.name, parent=None, params=run.config, tags=tags)
        for killed in end_killed(home.runs):
            registry.index_run(killed)
        registry.index_run(run)
        tracked.tag("reused", ", ".join(name for name, action in steps if action == "reuse"))
        models = ModelRegistry(home.mlflow_uri, home.mlflow_files)
        return cls(tracker, models, registry, tracked)

    @contextmanager
    def step(self, name: str, step: Step, fingerprint: str, *, reused: bool) -> Iterator[TrackedStep]:
        """Track one step; its MLflow run ends as what happened to it."""
        run = None
        if not reused:
            tags = {"moestro.stage": step.stage, "moestro.fingerprint": fingerprint}
            params = step.config.model_dump(mode="json")
            with self._lock:
                run = self._tracker.start(name, parent=self.run_id, params=params, tags=tags)
        try:
            yield TrackedStep(run, self._registry, self._lock)
        except BaseException as error:
            if run:
                with noting(error), self._lock:
                    stopped = isinstance(error, StoppedError | KeyboardInterrupt)
                    run.finish("cancelled" if stopped else "failed", told(error))
            raise
        if run:
            with self._lock:
                run.finish()

    def note(self, name: str, artifact: Artifact, record: Record) -> None:
        """Remember what the parent run shows at the end: held-out losses by stage, and the deployment."""
        with self._lock:
            if record.stage == "evaluate":
                self._evaluations[name.removeprefix("evaluate ")] = record.result["held_out_loss"]
            if record.stage == "deploy":
                self._deployment = artifact

    def finish(self, run: LifecycleRun, *, model_name: str | None) -> None:
        """End the parent run. A completed one shows its figures and introduces its deployment to the model registry:
        the first as @champion, later ones as @challenger, and one that was introduced before not again."""
        with self._lock:
            self._registry.index_run(run)
            if run.status == "completed":
                if self._evaluations:
                    self._run.log_figure("held_out_loss", figures.held_out_loss(self._evaluations))
                if model_name and self._deployment:
                    self._models.introduce(model_name, self._deployment, run_id=self.run_id)
            self._run.finish(run.status)
            self._registry.close()


def end_killed(runs: Path) -> Iterator[LifecycleRun]:
    """Runs whose process was killed, with records that say so. The home's lock is held: no other run is alive."""
    for run in read_runs(runs):
        if run.status == "running":
            ended = run.model_copy(update={"status": "cancelled"})
            ended.write(runs)
            yield ended


def step_figures(artifact: Artifact, registry: Registry) -> dict[str, Any]:
    """The plots of one step, by name."""
    history = artifact.path / "history.json"
    if artifact.stage == "profile":
        seen = registry.expert_statistics(artifact.record.inputs["model"].fingerprint)
        return {"expert_by_domain": figures.expert_heatmap(seen.counts, domains=seen.domains, origins=seen.origins)}
    if not history.exists():
        return {}
    steps = json.loads(history.read_text())["steps"]
    if artifact.stage == "rl":
        reward = {"reward": figures.reward_curve(steps)} if "reward" in steps[0] else {}
        return reward | ({"policy": figures.policy_panels(steps)} if figures.PANELS.keys() & steps[0].keys() else {})
    return {"loss": figures.loss_curves({artifact.stage: steps})}
