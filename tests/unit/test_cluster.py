"""Stages as Ray tasks: a worker killed with SIGKILL is replaced, and its stage goes on where it was."""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from moestro.artifacts import Artifact, ArtifactStore, SilentReporter
from moestro.cluster import Cluster
from moestro.cluster.board import BoardReporter
from moestro.config import EvaluateConfig, Resources
from moestro.errors import told
from moestro.execution import Step, run_step
from moestro_flows.home import Home

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
DEADLINE = 500.0
WAIT_FOR_A_MISTAKE = 5.0
"""Seconds in which a task starts that must not."""


class Recorder(SilentReporter):
    """Which steps were reported, as often as they were."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def metrics(self, values: Mapping[str, float], step: int) -> None:  # noqa: ARG002
        self.steps.append(step)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Cluster]:
    for name, value in Home(tmp_path).environment().items():
        if name.startswith("RAY_"):
            monkeypatch.setenv(name, value)
    cluster = Cluster(cpus=1)
    cluster.connect()
    yield cluster
    cluster.shutdown()


@pytest.fixture
def step(branch_step: Callable[..., Step]) -> Step:
    return branch_step(400)


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def workers(title: str) -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if title in " ".join(child.cmdline()):
                found.append(child)
    return found


def test_a_killed_worker_resumes_and_ends_with_the_same_bytes(cluster: Cluster, step: Step, tmp_path: Path) -> None:
    resources, reporter = Resources(cpus=1), Recorder()
    store = ArtifactStore(tmp_path / "home")
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(cluster.run, store, step, resources=resources, reporter=reporter, stopped=lambda: False)
        wait_for(lambda: 1 in reporter.steps and list(store.root.glob("work/branch/*/scratch/**/step-*.pt")))
        (worker,) = workers("ray::branch")
        worker.kill()
        artifact = made.result(DEADLINE)
    assert not worker.is_running()
    assert reporter.steps.count(1) == 1
    assert max(reporter.steps) == 400
    alone = run_step(ArtifactStore(tmp_path / "undisturbed"), step, resources=resources)
    assert artifact.record.files == alone.record.files


def test_what_measures_runs_in_one_process_that_yields_and_is_replaced(
    cluster: Cluster, step: Step, tmp_path: Path
) -> None:
    resources, store = Resources(cpus=1), ArtifactStore(tmp_path / "home")
    inputs = {"model": step.inputs["seed"], "tokens": {"code": step.inputs["tokens"]}}
    steps = [Step("evaluate", EvaluateConfig(sequence_length=length), inputs) for length in (16, 32)]

    def evaluate(step: Step) -> Artifact:
        return cluster.run(store, step, resources=resources, reporter=Recorder(), stopped=lambda: False)

    first = evaluate(steps[0])
    (background,) = workers("ray::_Background")
    assert os.sched_getscheduler(background.pid) == os.SCHED_IDLE
    background.kill()
    second = evaluate(steps[1])
    (replacement,) = workers("ray::_Background")
    assert replacement.pid != background.pid
    for done, artifact in zip(steps, (first, second), strict=True):
        alone = run_step(ArtifactStore(tmp_path / "undisturbed"), done, resources=resources)
        assert artifact.record.files == alone.record.files


class SlowBoard:
    """Answers `begin` when it is told to."""

    def __init__(self) -> None:
        self.asked, self.free = asyncio.Event(), asyncio.Event()

    async def begin(self, _key: str) -> int:
        self.asked.set()
        await self.free.wait()
        return 1

    async def wait_until_asked(self) -> None:
        await self.asked.wait()

    async def answer(self) -> None:
        self.free.set()


def test_a_worker_that_waits_for_the_board_keeps_its_cores(cluster: Cluster) -> None:
    import ray

    def begin(board: Any) -> int:
        return int(BoardReporter(board, "key").attempt)

    with cluster.using():
        board = ray.remote(SlowBoard).options(num_cpus=0, max_concurrency=4).remote()
        first = ray.remote(begin).options(num_cpus=1).remote(board)
        ray.get(board.wait_until_asked.remote())
        second = ray.remote(lambda: 2).options(num_cpus=1).remote()
        assert ray.wait([second], timeout=WAIT_FOR_A_MISTAKE)[0] == []
        ray.get(board.answer.remote())
        assert ray.get([first, second]) == [1, 2]


def test_an_unexpected_error_of_a_worker_is_told_in_one_line(cluster: Cluster, step: Step, tmp_path: Path) -> None:
    seedless = Step(step.stage, step.config, {"tokens": step.inputs["tokens"]})
    store = ArtifactStore(tmp_path / "home")
    with pytest.raises(TypeError) as raised:
        cluster.run(store, seedless, resources=Resources(cpus=1), reporter=Recorder(), stopped=lambda: False)
    assert told(raised.value) == "TypeError: branch() missing 1 required keyword-only argument: 'seed'"
    (note,) = raised.value.__notes__
    assert note.startswith("On its worker:\n")
    assert "\x1b" not in note
