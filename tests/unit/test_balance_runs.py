"""Rules with a state, killed and resumed: the same bias, noise and curve."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from moestro.artifacts import Job, file_digest
from moestro.config import BipBalance, ErcLoss, LossFreeBalance, RoutingLossConfig, TrainingConfig
from moestro.data.packed import Mixture, PackedTokens
from moestro.training.loop import train
from moestro.training.routing_losses import Context, routing_objective

RUN = TrainingConfig(steps=10, batch_size=8, accumulation=2, sequence_length=16, checkpoint_every=3, log_every=1)
LOSSES: dict[str, RoutingLossConfig] = {
    "loss_free": LossFreeBalance(update_rate=0.01),
    "bip": BipBalance(),
    "erc": ErcLoss(seed=3),
}
MEMBER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_balance_runs as tests
folder, loss, killed_at = sys.argv[2:]
tests.run(Path(folder), loss, int(killed_at))
"""


class Killing:
    """Ends its own process, as a lost node would, once a step is done."""

    def __init__(self, step: int) -> None:
        self.step = step

    def progress(self, done: int, _total: int, _message: str = "") -> None:
        if done == self.step:
            os.kill(os.getpid(), signal.SIGKILL)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Not told."""


def run(folder: Path, loss: str, killed_at: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = Glm4MoeConfig(
        vocab_size=64,
        hidden_size=32,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        first_k_dense_replace=0,
        initializer_range=0.2,
        pad_token_id=0,
    )
    model = Glm4MoeForCausalLM(config)
    generator = np.random.default_rng(0)
    domains = {name: PackedTokens.of(generator.integers(0, 64, 900).astype(np.uint16)) for name in ("code", "math")}
    objective = routing_objective(
        [LOSSES[loss]], Context(model, [["code", "math", "seed", "seed"]] * 2, tuple(domains))
    )
    job = Job(out=folder / "out", scratch=folder / "scratch", reporter=Killing(killed_at))
    train(model, Mixture(domains, 16, seed=0), RUN, job=job, trainable=lambda _: True, auxiliary=objective)
    model.save_pretrained(folder / "out")


def started(folder: Path, loss: str, killed_at: int = 0) -> int:
    """The exit code of a process that trains."""
    for part in ("out", "scratch"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", MEMBER, str(Path(__file__).parent), str(folder), loss, str(killed_at)]
    return subprocess.run(command, timeout=240, check=False).returncode


def biases(folder: Path) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    stored = load_file(folder / "out/model.safetensors")
    return [value for name, value in sorted(stored.items()) if name.endswith("e_score_correction_bias")]


@pytest.fixture(scope="module", params=LOSSES)
def loss(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def whole(loss: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One worker's undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    assert started(folder, loss) == 0
    return folder


@pytest.mark.slow
def test_killed_runs_give_the_same_bytes(whole: Path, loss: str, tmp_path: Path) -> None:
    assert started(tmp_path / "killed", loss, killed_at=5) == -signal.SIGKILL
    assert started(tmp_path / "killed", loss) == 0
    for name in ("model.safetensors", "history.json"):
        assert file_digest(whole / "out" / name) == file_digest(tmp_path / "killed/out" / name), name
    assert [bool(bias_E.any()) for bias_E in biases(whole)] == [loss != "erc"] * 2
