"""A stage trained by several workers together: Ray Train starts them, one process group joins them.

Every worker runs the stage's function. The first owns the work folder, reports and publishes; the others read what it
has kept, train along, and write nowhere. Ray Train restarts nothing: a lost worker ends the group, and `Cluster`
starts another, which resumes. So retries are counted in one place, and an error of the stage is never retried.
"""

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moestro.artifacts import Artifact, ArtifactStore
from moestro.cluster.board import BoardReporter
from moestro.cluster.claims import claimant
from moestro.config import Resources
from moestro.errors import LostWorkerError, MoestroError
from moestro.execution import Step, follow_step, run_step

COLLECTIVE_SECONDS = 24 * 3600
"""How long a worker waits for the others: Ray knows earlier if one is lost, and worker 0 may have to write for long."""


def workers_for(step: Step, resources: Resources) -> int:
    """Workers that `step` takes: those of the resources if it trains, else one.

    Raises `ConfigError` if its batches do not divide into as many shares.
    """
    training = getattr(step.config, "training", None)
    if training is None or resources.branch_workers == 1:
        return 1
    from moestro.training.parallel import check_share

    check_share(training.batch_size, training.accumulation, resources.branch_workers)
    return resources.branch_workers


def train_together(root: Path, step: Step, resources: Resources, board: Any, key: str) -> Artifact:
    """The Ray task that holds a group together; it takes no core itself.

    Raises what the stage raised, or `LostWorkerError` if a worker was lost.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchConfig, TorchTrainer

    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # paths of configs may be relative
    with tempfile.TemporaryDirectory() as folder:  # Ray Train wants one; nothing is kept there
        trainer = TorchTrainer(
            _member,
            train_loop_config={"root": root, "step": step, "resources": resources, "board": board, "key": key},
            torch_config=TorchConfig(backend="gloo", timeout_s=COLLECTIVE_SECONDS),
            scaling_config=ScalingConfig(
                num_workers=resources.branch_workers, resources_per_worker={"CPU": resources.cpus or 1}
            ),
            run_config=RunConfig(name=key, storage_path=folder, failure_config=FailureConfig(max_failures=0)),
        )
        try:
            result = trainer.fit()
        except WorkerGroupError as error:
            raise _cause(error.worker_failures.values()) from None
    artifact: Artifact = result.return_value
    return artifact


def _member(config: dict[str, Any]) -> Artifact | None:
    """What every worker of the group does; the first one returns the artifact."""
    import ray

    from moestro.training import parallel

    step, resources = config["step"], config["resources"]
    place = config["board"].place.remote(config["key"], ray.util.get_current_placement_group())
    place.future().result()  # not `ray.get`, see `BoardReporter`
    if parallel.rank() > 0:
        if scratch := parallel.broadcast(None):
            follow_step(step, scratch, resources=resources)
        return None
    return _lead(ArtifactStore(config["root"]), step, resources, BoardReporter(config["board"], config["key"]))


def _lead(store: ArtifactStore, step: Step, resources: Resources, reporter: BoardReporter) -> Artifact:
    import ray

    from moestro.training import parallel

    told = False

    def began(scratch: Path) -> None:
        nonlocal told
        told = True
        parallel.broadcast(scratch)

    try:
        artifact = run_step(
            store, step, resources=resources, reporter=reporter, claimant=claimant(reporter.key), began=began
        )
    finally:
        ray.get(reporter.flush())
    if not told:
        parallel.broadcast(None)
    return artifact


def _cause(failures: Iterable[BaseException]) -> BaseException:
    """What ended a group: an error of the stage before a lost worker, which the others only notice."""
    causes = [getattr(failure, "_base_exc", failure) for failure in failures]
    lost = [cause for cause in causes if isinstance(cause, LostWorkerError) or _is_rays(cause)]
    own = [cause for cause in causes if cause not in lost]
    told = [cause for cause in own if isinstance(cause, MoestroError)]
    if told or own:
        return (told or own)[0]
    return LostWorkerError(str(lost[0]).splitlines()[0] if lost else "The group ended.")


def _is_rays(cause: BaseException) -> bool:
    import ray
    from ray.train.v2._internal.exceptions import RayTrainError

    return isinstance(cause, ray.exceptions.RayError | RayTrainError)
