"""Stages as Ray tasks: a worker killed with SIGKILL is replaced, and its stage goes on where it was."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moestro.artifacts import Artifact, ArtifactStore, SilentReporter
from moestro.cluster import Cluster
from moestro.config import BranchConfig, Resources, TrainingConfig
from moestro.data.tokenizer import train_bpe
from moestro.execution import Step, run_step
from moestro.models.checkpoint import save_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
DEADLINE = 120.0


class Recorder(SilentReporter):
    """Which steps were reported, as often as they were."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def metrics(self, values: Mapping[str, float], step: int) -> None:  # noqa: ARG002
        self.steps.append(step)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    cluster = Cluster(cpus=1)
    cluster.connect()
    yield cluster
    cluster.shutdown()


@pytest.fixture
def step(tmp_path: Path) -> Step:
    """A branch of some seconds, with a checkpoint every few hundredths of one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    train_bpe(["some text"], 300).save_pretrained(tmp_path / "tokenizer")
    save_model(LlamaForCausalLM(config), tmp_path / "seed", tokenizer_from=tmp_path / "tokenizer")
    (tmp_path / "tokens").mkdir()
    ids = np.random.default_rng(0).integers(0, 300, 5000).astype(np.uint16)
    np.save(tmp_path / "tokens" / "train.npy", ids)
    np.save(tmp_path / "tokens" / "train_documents.npy", np.zeros(1, dtype=np.int64))
    training = TrainingConfig(steps=400, batch_size=8, sequence_length=64, checkpoint_every=10, log_every=1)
    inputs = {"seed": Artifact(tmp_path / "seed", "seed", "5"), "tokens": Artifact(tmp_path / "tokens", "tokens", "7")}
    return Step("branch", BranchConfig(domain="code", training=training), inputs)


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def workers() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "ray::branch" in " ".join(child.cmdline()):
                found.append(child)
    return found


def test_a_killed_worker_resumes_and_ends_with_the_same_bytes(cluster: Cluster, step: Step, tmp_path: Path) -> None:
    resources, reporter = Resources(cpus=1), Recorder()
    store = ArtifactStore(tmp_path / "home")
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(cluster.run, store, step, resources=resources, reporter=reporter, stopped=lambda: False)
        wait_for(lambda: 1 in reporter.steps and list(store.root.glob("work/branch/*/scratch/**/step-*.pt")))
        (worker,) = workers()
        worker.kill()
        artifact = made.result(DEADLINE)
    assert not worker.is_running()
    assert reporter.steps.count(1) == 1
    assert max(reporter.steps) == 400
    alone = run_step(ArtifactStore(tmp_path / "undisturbed"), step, resources=resources)
    assert artifact.record.files == alone.record.files
