"""Runs that end early: stopped on held-out loss, of another owner, or on a full disk."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from moestro.artifacts import Job
from moestro.config import EarlyStopping, GlobalBatchLoss, OptimizerConfig, RoutingLossConfig, TrainingConfig, ZLoss
from moestro.data.packed import Mixture, PackedTokens
from moestro.errors import ConfigError, InputError, TrainingError
from moestro.training.frozen_experts import FrozenExperts
from moestro.training.held_out import HeldOutText, Stopper
from moestro.training.history import TrainingResult
from moestro.training.loop import train
from moestro.training.objective import next_token_loss
from moestro.training.routing_losses import Context, routing_objective

pytestmark = pytest.mark.usefixtures("one_thread")

S = 16
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
STOPPING = EarlyStopping(every=4, patience=2, max_tokens=256)
CONFIG = TrainingConfig(
    steps=60,
    batch_size=4,
    sequence_length=S,
    checkpoint_every=3,
    log_every=5,
    early_stopping=STOPPING,
    optimizer=OptimizerConfig(learning_rate=2e-2, warmup_steps=0, schedule="constant"),
)


def model_of(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def tokens(seed: int, count: int = 400) -> PackedTokens:
    """Noise: what is learnt of it is learnt by heart, so the loss on other noise soon rises."""
    return PackedTokens.of(np.random.default_rng(seed).integers(0, 64, count).astype(np.uint16))


class InterruptedRunError(Exception):
    """Raised by a reporter in mid-training."""


class Reporter:
    def __init__(self, interrupt_at: int | None = None) -> None:
        self.interrupt_at = interrupt_at
        self.rows: dict[int, dict[str, float]] = {}

    def progress(self, done: int, _total: int, _message: str = "") -> None:
        if done == self.interrupt_at:
            raise InterruptedRunError

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.rows[step] = dict(values)


def run(
    folder: Path, model: PreTrainedModel, config: TrainingConfig = CONFIG, *, at: int | None = None, **changes: Any
) -> TrainingResult:
    for name in ("out", "scratch"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    job = Job(out=folder / "out", scratch=folder / "scratch", reporter=Reporter(at))
    given = {"held_out": {"noise": tokens(1)}, "trainable": lambda _: True, **changes}
    return train(model, Mixture({"noise": tokens(0)}, S, seed=0), config, job=job, **given)


def test_it_stops_and_returns_the_best_weights(tmp_path: Path) -> None:
    model = model_of()
    result = run(tmp_path, model)
    rows = json.loads((tmp_path / "out/history.json").read_text())["steps"]
    measured = {row["step"]: row["held_out_loss"] for row in rows if "held_out_loss" in row}
    assert list(measured) == list(range(4, result.steps + 1, 4))
    assert all(row["loss"] > 0 and row.get("held_out_loss/noise", 0) == row.get("held_out_loss", 0) for row in rows)
    assert result.stopped_at == result.steps < 60
    assert result.best_step == min(measured, key=lambda step: measured[step]) == result.steps - 8
    assert result.best_held_out_loss == min(measured.values())
    again = HeldOutText({"noise": tokens(1)}, CONFIG, STOPPING.max_tokens).losses(model, 0)["held_out_loss"]
    assert again == result.best_held_out_loss
    assert result.figures()["stopped_at"] == result.stopped_at


@pytest.mark.parametrize("at", [5, 10, 11])
def test_a_resumed_run_stops_at_the_same_step_with_the_same_bits(tmp_path: Path, at: int) -> None:
    whole, resumed = model_of(), model_of()
    expected = run(tmp_path / "whole", whole)
    assert expected.steps > at
    with pytest.raises(InterruptedRunError):
        run(tmp_path / "resumed", model_of(), at=at)
    result = run(tmp_path / "resumed", resumed)
    assert (result.stopped_at, result.best_step) == (expected.stopped_at, expected.best_step)
    finished = run(tmp_path / "resumed", model_of())  # what was lost is what comes after training
    assert finished.stopped_at == expected.stopped_at
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    histories = [(tmp_path / name / "out/history.json").read_bytes() for name in ("whole", "resumed")]
    assert histories[0] == histories[1]


def test_without_early_stopping_the_measurements_change_nothing(tmp_path: Path) -> None:
    one, other = model_of(), model_of()
    patient = CONFIG.model_copy(update={"steps": 8, "early_stopping": STOPPING.model_copy(update={"patience": 9})})
    result = run(tmp_path / "measured", one, patient)
    plain = run(tmp_path / "plain", other, patient.model_copy(update={"early_stopping": None}), held_out=None)
    assert (result.stopped_at, plain.best_step) == (None, None)
    assert "best_step" not in plain.figures()
    if result.best_step == 8:
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    with pytest.raises(ConfigError, match="no held-out text"):
        run(tmp_path / "none", model_of(), held_out=None)


def test_patience_and_the_least_improvement() -> None:
    model = torch.nn.Linear(1, 1)
    stopper = Stopper(EarlyStopping(patience=2, min_improvement=0.1))
    for step, loss in enumerate((3.0, 2.95, 2.5), 1):
        stopper.measured(step, loss, model)
        assert not stopper.stopped
    stopper.measured(4, 2.45, model)
    stopper.measured(5, 2.6, model)
    assert stopper.stopped
    assert (stopper.best_step, stopper.best_loss) == (4, 2.45)


def test_held_out_loss_is_the_mean_over_domains_and_leaves_short_documents_apart() -> None:
    model = model_of().eval()
    texts = {"one": tokens(1, 40), "other": tokens(2, 400)}
    losses = HeldOutText(texts, CONFIG, 64).losses(model, 0)
    assert losses["held_out_loss"] == pytest.approx((losses["held_out_loss/one"] + losses["held_out_loss/other"]) / 2)
    windows = torch.from_numpy(texts["one"].ids[: 2 * 17].reshape(2, 17).astype(np.int64))
    assert losses["held_out_loss/one"] == pytest.approx(float(next_token_loss(model, windows)[0].detach()), rel=1e-6)
    apart = CONFIG.model_copy(update={"cross_document_attention": False})
    cut = PackedTokens(texts["one"].ids, np.arange(0, 40, 5))
    assert HeldOutText({"one": cut}, apart, 64).losses(model, 0)["held_out_loss"] != losses["held_out_loss/one"]
    with pytest.raises(InputError, match="no held-out text"):
        HeldOutText({"none": tokens(0, 1)}, CONFIG, 64)


@pytest.mark.parametrize("measurement", [1, 2])
def test_a_held_out_loss_that_is_not_finite_names_step_and_domain(tmp_path: Path, measurement: int) -> None:
    class Breaking(Reporter):
        def progress(self, done: int, _total: int, _message: str = "") -> None:
            if done == 4 * measurement:
                model.model.embed_tokens.weight.data[63] = float("nan")

    model = model_of()
    for name in ("out", "scratch"):
        (tmp_path / name).mkdir()
    job = Job(out=tmp_path / "out", scratch=tmp_path / "scratch", reporter=Breaking())
    texts = {"sound": PackedTokens.of(np.zeros(300, dtype=np.uint16)), "noise": tokens(1)}
    message = f"after step {4 * measurement}: the loss on the held-out text of domain 'noise' is nan"
    with pytest.raises(TrainingError, match=message):
        train(
            model,
            Mixture({"noise": tokens(0)}, S, seed=0),
            CONFIG,
            job=job,
            trainable=lambda _: True,
            held_out=texts,
        )


@pytest.mark.parametrize("other", ["config", "model", "data", "trainable"])
def test_another_runs_checkpoint_is_refused(tmp_path: Path, other: str) -> None:
    with pytest.raises(InterruptedRunError):
        run(tmp_path, model_of(), at=10)
    model, config, changes = model_of(int(other == "model")), CONFIG, {}
    if other == "config":
        config = CONFIG.model_copy(update={"optimizer": OptimizerConfig(learning_rate=1e-2)})
    elif other == "trainable":
        changes = {"trainable": lambda name: "mlp" in name}
    before = sorted((tmp_path / "scratch/training").iterdir())
    data = Mixture({"noise": tokens(0, 600 if other == "data" else 400)}, S, seed=0)
    job = Job(out=tmp_path / "out", scratch=tmp_path / "scratch")
    given = {"trainable": lambda _: True, **changes}
    with pytest.raises(InputError, match="another config, model or data"):
        train(model, data, config, job=job, held_out={"noise": tokens(1)}, **given)
    assert sorted((tmp_path / "scratch/training").iterdir()) == before
    every = CONFIG.model_copy(update={"checkpoint_every": 7})
    assert run(tmp_path, model_of(), every).steps > 10


@pytest.mark.parametrize("other", ["coefficient", "one loss more", "none", "frozen"])
def test_a_checkpoint_of_other_losses_or_frozen_experts_is_refused(tmp_path: Path, other: str) -> None:
    origins = [["code", "math", "seed", "seed"]]

    def tuned(losses: list[RoutingLossConfig], frozen: list[str], at: int | None = None) -> TrainingResult:
        torch.manual_seed(0)
        model = MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4, sliding_window=None))
        return run(
            tmp_path,
            model,
            CONFIG.model_copy(update={"steps": 8, "early_stopping": None}),
            at=at,
            auxiliary=routing_objective(losses, Context(model, origins, ("noise",))),
            frozen=FrozenExperts(model, origins, frozen) if frozen else None,
        )

    with pytest.raises(InterruptedRunError):
        tuned([GlobalBatchLoss()], ["math"], at=4)
    losses: dict[str, list[RoutingLossConfig]] = {
        "coefficient": [GlobalBatchLoss(coefficient=0.5)],
        "one loss more": [GlobalBatchLoss(), ZLoss()],
        "none": [],
    }
    with pytest.raises(InputError, match="another config, model or data"):
        tuned(losses.get(other, [GlobalBatchLoss()]), ["code"] if other == "frozen" else ["math"])
    assert tuned([GlobalBatchLoss()], ["math"]).steps == 8


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from torch import nn
from moestro.errors import ResourceError
from moestro.training.state import save_state
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model = nn.Linear(300, 300)
optimizer = torch.optim.AdamW(model.parameters())
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
folder = Path(sys.argv[1])
given = {"model": model, "optimizer": optimizer, "schedule": schedule, "owner": "me", "extra": {}}
save_state(folder, 1, **given)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_state(folder, 2, **given)
except ResourceError as error:
    print(error)
"""


def test_a_full_disk_is_one_error_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "training")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "No space left on the disk that holds" in done.stdout
    assert [path.name[:13] for path in (tmp_path / "training").iterdir()] == ["step-00000001"]
