"""A cluster of unequal nodes on this machine: what runs where, and what if a node, a worker or a driver dies."""

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from moestro.artifacts import Artifact, ArtifactStore, SilentReporter
from moestro.cluster import Cluster
from moestro.cluster.claims import claimant
from moestro.config import OptimizerConfig, Resources
from moestro.errors import ConfigError, InputError, MoestroError, ResourceError, StoppedError, TrainingError
from moestro.execution import Step, run_step
from moestro_flows.home import Home

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
DEADLINE = 900.0
SMALL, LARGE = 1, 2  # cores; the head has none
ALONE = Resources(cpus=1)
PAIR = Resources(cpus=1, branch_workers=2)

DRIVER = """
import pickle, sys
from pathlib import Path
from moestro.artifacts import ArtifactStore, SilentReporter
from moestro.cluster import Cluster
from moestro.config import Resources

class Told(SilentReporter):
    def metrics(self, values, step):
        print(step, flush=True)

cluster = Cluster(sys.argv[1])
cluster.connect()
for step in pickle.loads(Path(sys.argv[3]).read_bytes()):
    made = cluster.run(ArtifactStore(Path(sys.argv[2])), step, resources=Resources(cpus=1), reporter=Told(),
                       stopped=lambda: False)
    print("made", made.fingerprint, flush=True)
cluster.shutdown()
"""


class Recorder(SilentReporter):
    """The rows that were reported."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.rows.append((step, dict(values)))

    @property
    def steps(self) -> list[int]:
        return [step for step, _ in self.rows]


class Machines:
    """The nodes, and a driver that is connected to them."""

    def __init__(self, nodes: Any) -> None:
        self.nodes = nodes
        self.large = nodes.add_node(num_cpus=LARGE)
        nodes.add_node(num_cpus=SMALL)
        self.cluster = Cluster(nodes.address)
        self.pool = ThreadPoolExecutor(4)

    def submit(self, store: ArtifactStore, step: Step, resources: Resources, **how: Any) -> "Future[Artifact]":
        call = partial(self.cluster.run, reporter=Recorder(), stopped=lambda: False)
        return self.pool.submit(partial(call, store, step, resources=resources, **how))

    def lose_the_large_one(self) -> None:
        self.nodes.remove_node(self.large, allow_graceful=False)

    def mend(self) -> None:
        self.large = self.nodes.add_node(num_cpus=LARGE)


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    from ray.cluster_utils import Cluster as Nodes

    with pytest.MonkeyPatch.context() as patch:
        for name, value in Home(tmp_path_factory.mktemp("home")).environment().items():
            if name.startswith("RAY_"):
                patch.setenv(name, value)
        nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            machines = Machines(nodes)
            nodes.wait_for_nodes(DEADLINE)
            machines.cluster.connect()
            yield machines
            machines.cluster.shutdown()
        finally:
            nodes.shutdown()


def wait_for(condition: Callable[[], object], *running: "Future[Artifact]") -> None:
    """Raises what has ended one of those that are `running`."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end
        for future in running:
            if future.done():
                future.result()
        time.sleep(0.02)


def checkpoints(store: ArtifactStore) -> set[str]:
    """Work folders that hold a checkpoint."""
    return {path.parents[2].name for path in store.root.glob("work/branch/*/scratch/training/step-*.pt")}


def begun(store: ArtifactStore) -> set[str]:
    """Branches with a checkpoint, by the first digits of their fingerprints."""
    return {name.partition(".")[0] for name in checkpoints(store)}


def published(store: ArtifactStore) -> set[str]:
    """Branches that are there, by the first digits of their fingerprints."""
    return {path.name for path in store.root.glob("artifacts/branch/*")}


def claims(store: ArtifactStore) -> dict[str, str]:
    """The node on which each attempt runs or ran."""
    found = {}
    for path in store.root.glob("work/branch/*.lock"):
        with contextlib.suppress(FileNotFoundError, ValueError):
            found[path.stem] = json.loads(path.read_text())["labels"]["node"]
    return found


def processes(title: str) -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if title in " ".join(child.cmdline()):
                found.append(child)
    return found


def members(count: int) -> list[psutil.Process]:
    """The workers of the one group that runs, once those of groups before it have ended."""
    wait_for(lambda: len(processes("RayTrainWorker")) == count)
    return processes("RayTrainWorker")


def history(artifact: Artifact) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = json.loads((artifact.path / "history.json").read_text())["steps"]
    return rows


def test_branches_spread_over_the_nodes_and_a_lost_ones_go_on_elsewhere(
    machines: Machines, branch_step: Callable[..., Step], tmp_path: Path
) -> None:
    import ray

    store = ArtifactStore(tmp_path / "home")
    steps, recorders = [branch_step(400, seed=seed) for seed in range(3)], [Recorder() for _ in range(3)]
    running = [
        machines.submit(store, step, ALONE, reporter=recorder) for step, recorder in zip(steps, recorders, strict=True)
    ]
    wait_for(lambda: len(checkpoints(store)) == 3 and all(recorder.rows for recorder in recorders), *running)
    nodes = list(claims(store).values())
    assert sorted(nodes.count(node) for node in set(nodes)) == [SMALL, LARGE]
    gone = next(node for node in nodes if nodes.count(node) == LARGE)
    machines.lose_the_large_one()
    try:
        made = [future.result(DEADLINE) for future in running]
    finally:
        machines.mend()
    attempts = sorted(int(name.rpartition(".")[2]) for name in claims(store))
    assert attempts[0] == 1
    assert min(attempts[1:]) > 1
    (left,) = set(claims(store).values())
    assert left != gone
    job = ray.get_runtime_context().get_job_id()
    lost = claimant("another task").lost
    wait_for(lambda: lost({"task": "a task", "node": gone, "job": job}))  # workers are missed before their node is
    found = [lost({"task": "a task", "node": node, "job": job}) for node in (gone, left, "another cluster's")]
    assert (found, lost({"task": "another task"}), lost({})) == ([True, False, False], True, False)
    assert [recorder.steps.count(1) for recorder in recorders] == [1, 1, 1]
    for step, artifact in zip(steps, made, strict=True):
        assert artifact.record.files == run_step(ArtifactStore(tmp_path / "alone"), step, resources=ALONE).record.files


def test_a_group_spans_nodes_and_resumes_after_losing_a_worker(
    machines: Machines, branch_step: Callable[..., Step], tmp_path: Path
) -> None:
    three = Resources(cpus=1, branch_workers=3)
    step, recorder = branch_step(300, batch_size=6), Recorder()
    alone = machines.submit(ArtifactStore(tmp_path / "alone"), step, three).result(DEADLINE)
    store = ArtifactStore(tmp_path / "home")
    running = machines.submit(store, step, three, reporter=recorder)
    wait_for(lambda: checkpoints(store) and recorder.rows, running)
    members(3)[1].kill()
    made = running.result(DEADLINE)
    assert made.record.files == alone.record.files
    assert recorder.steps.count(1) == 1
    one = run_step(ArtifactStore(tmp_path / "one"), step, resources=ALONE)
    for row, expected in zip(history(made)[:20], history(one)[:20], strict=True):
        assert row["step"] == expected["step"]
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_a_group_on_a_lost_node_waits_for_cores_and_resumes(
    machines: Machines, branch_step: Callable[..., Step], tmp_path: Path
) -> None:
    step, recorder = branch_step(200), Recorder()
    alone = machines.submit(ArtifactStore(tmp_path / "alone"), step, PAIR).result(DEADLINE)
    store = ArtifactStore(tmp_path / "home")
    running = machines.submit(store, step, PAIR, reporter=recorder)
    wait_for(lambda: checkpoints(store) and recorder.rows, running)
    machines.lose_the_large_one()
    machines.mend()
    assert running.result(DEADLINE).record.files == alone.record.files
    assert recorder.steps.count(1) == 1


def test_a_group_whose_workers_keep_dying_gives_up(
    machines: Machines, branch_step: Callable[..., Step], tmp_path: Path
) -> None:
    store = ArtifactStore(tmp_path)
    running = machines.submit(store, branch_step(4000), PAIR.model_copy(update={"max_retries": 0}))
    wait_for(lambda: checkpoints(store), running)
    members(2)[0].kill()
    with pytest.raises(
        ResourceError, match=r"The worker of branch died 1 times: .* it resumes from the last checkpoint"
    ):
        running.result(DEADLINE)
    assert checkpoints(store)


@pytest.mark.parametrize("kind", [InputError, TrainingError])
def test_a_groups_errors_are_the_stages_own(
    machines: Machines, branch_step: Callable[..., Step], tmp_path: Path, kind: type[MoestroError]
) -> None:
    step = branch_step(20, optimizer=OptimizerConfig(learning_rate=1e30, warmup_steps=0, max_grad_norm=1e30))
    if kind is InputError:
        (tmp_path / "tokens" / "train.npy").unlink()
    with pytest.raises(kind) as alone:
        run_step(ArtifactStore(tmp_path / "alone"), step, resources=ALONE)
    with pytest.raises(kind) as together:
        machines.submit(ArtifactStore(tmp_path / "home"), step, PAIR).result(DEADLINE)
    told = [(type(error.value), error.value.hint) for error in (alone, together)]
    assert told[0] == told[1]
    assert together.value.message.partition(":")[0] == alone.value.message.partition(":")[0]


def test_what_cannot_run_is_refused_before_any_work(
    machines: Machines, branch_step: Callable[..., Step], tmp_path: Path
) -> None:
    store = ArtifactStore(tmp_path / "home")
    with pytest.raises(ConfigError, match=r"batch_size: 6 does not divide by 2 \(accumulation\) x 2 workers"):
        machines.submit(store, branch_step(20, batch_size=6, accumulation=2), PAIR).result(DEADLINE)
    step = branch_step(20)
    for resources, words in (
        (Resources(cpus=3), "branch asks for 3 cores, the cluster's nodes have 2, 1, 0."),
        (Resources(cpus=2, branch_workers=2), "branch asks for 2 workers with 2 cores each"),
    ):
        with pytest.raises(ResourceError, match=words):
            machines.submit(store, step, resources).result(DEADLINE)
    assert not store.root.exists()


def test_a_cancelled_group_ends_and_frees_its_cores(
    machines: Machines, branch_step: Callable[..., Step], tmp_path: Path
) -> None:
    import ray

    store, recorder = ArtifactStore(tmp_path / "home"), Recorder()
    running = machines.submit(store, branch_step(4000), PAIR, reporter=recorder, stopped=lambda: bool(recorder.rows))
    with pytest.raises(StoppedError):
        running.result(DEADLINE)
    wait_for(lambda: not processes("RayTrainWorker"))
    wait_for(lambda: ray.available_resources().get("CPU") == SMALL + LARGE)


def test_a_killed_drivers_finished_branches_are_kept_and_the_unfinished_resumes(
    machines: Machines, branch_step: Callable[..., Step], tmp_path: Path
) -> None:
    store, steps = ArtifactStore(tmp_path / "home"), [branch_step(30, seed=1), branch_step(400, seed=2)]
    (tmp_path / "steps").write_bytes(pickle.dumps(steps))
    command = [sys.executable, "-c", DRIVER, machines.nodes.address, str(store.root), str(tmp_path / "steps")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as driver:
        try:
            wait_for(lambda: driver.poll() is not None or (published(store) and begun(store) - published(store)))
        finally:
            os.kill(driver.pid, signal.SIGKILL)
    (first,) = [path for path, _ in store.records()]
    before = first.stat().st_mtime_ns
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=DEADLINE).stdout.splitlines()
    made = [line.split()[1] for line in told if line.startswith("made")]
    resumed = [int(line) for line in told if not line.startswith("made")]
    assert first.stat().st_mtime_ns == before
    assert min(resumed) > 1
    assert max(resumed) == 400
    for step, identity in zip(steps, made, strict=True):
        artifact = store.find("branch", identity)
        assert artifact
        assert artifact.record.files == run_step(ArtifactStore(tmp_path / "alone"), step, resources=ALONE).record.files
