"""`Lab`: stages run on a Ray cluster, each result made once, kept in a store and found again by the next run.

Everything here is of one random seed, which seeds the initial weights, the order of data and the routers' start.
"""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from moestro.artifacts import Artifact, ArtifactStore
from moestro.cluster import Cluster
from moestro.config import Config, Resources
from moestro.errors import StoppedError
from moestro.execution import Step
from moestro.stages import flatten

Telling = Callable[[str], None]
"""Told about each result, one line."""


class Workshop:
    """The store and the cluster that all labs share. A result that several ask for is made for the first."""

    def __init__(self, root: Path, cluster: Cluster, tell: Telling) -> None:
        self.store = ArtifactStore(root)
        self.cluster = cluster
        self.tell = tell
        self.in_turn = threading.Lock()
        """For what loads models in this process, which transformers cannot do in two threads at a time."""
        self.ensembles: dict[tuple[str, ...], dict[int, dict[str, float]]] = {}
        """Held-out losses of branches that predict together, by their fingerprints and how many do."""
        self._made: dict[tuple[str, ...], Future[Artifact]] = {}
        self._lock = threading.Lock()
        self.stop = threading.Event()
        """Ends what is running; set by the first failure, or by whoever waits no longer."""
        self.failure: BaseException | None = None
        """The first one; what it stopped failed because of it."""

    def run(self, name: str, stage: str, config: Config, inputs: Mapping[str, Any]) -> Artifact:
        """The artifact, on one core of the cluster. Raises what the stage raises, `StoppedError` after a failure."""
        roles = (f"{role}={item.fingerprint}" for role, item in sorted(flatten(inputs).items()))
        key = (stage, config.model_dump_json(), *roles)
        with self._lock:
            known = self._made.get(key)
            future = self._made.setdefault(key, Future())
        if known is not None:
            return known.result()
        try:
            future.set_result(self._run(name, Step(stage, config, inputs)))
        except BaseException as error:
            with self._lock:
                self.failure = self.failure or error
            self.stop.set()
            future.set_exception(error)
            raise
        return future.result()

    def _run(self, name: str, step: Step) -> Artifact:
        identity = step.identity(step.roles())
        found = self.store.find(step.stage, identity)
        if found is None and self.stop.is_set():
            raise StoppedError
        artifact = found or self.cluster.run(
            self.store, step, resources=Resources(cpus=1), reporter=_Quiet(), stopped=self.stop.is_set
        )
        self.tell(f"{name}: {'found' if found else f'{artifact.record.seconds:.0f} s'}")
        return artifact


class Lab:
    """One random seed's stages, by name for whoever watches."""

    def __init__(self, workshop: Workshop, seed: int) -> None:
        self.workshop = workshop
        self.seed = seed

    def run(self, stage: str, config: Config, what: str = "", **inputs: Any) -> Artifact:
        """The artifact of `stage` for `config` and `inputs`."""
        return self.workshop.run(f"seed {self.seed}, {stage} {what}".rstrip(), stage, config, inputs)


class _Quiet:
    """Progress is told by whole results."""

    def progress(self, done: int, total: int, message: str = "") -> None:
        """Ignore."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Ignore."""
