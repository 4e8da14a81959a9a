"""The loop on tiny real models: resume after SIGKILL, damaged checkpoints, infinite losses, frozen weights."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from moestro.artifacts import Job, file_digest
from moestro.config import GlobalBatchLoss, OptimizerConfig, TrainingConfig, ZLoss
from moestro.data.packed import Mixture, PackedTokens
from moestro.errors import ConfigError, InputError, TrainingError
from moestro.models.routers import is_router_weight
from moestro.training.loop import train
from moestro.training.routing_losses import Context, routing_objective

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIG = TrainingConfig(steps=12, batch_size=4, accumulation=2, sequence_length=16, checkpoint_every=3, log_every=5)

CHILD = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_training_loop import CONFIG, Pipe, job_in, mixture, model_of, train_any
model = model_of(sys.argv[3])
train_any(model, CONFIG.model_copy(update={"dtype": sys.argv[4]}), job_in(Path(sys.argv[2]), Pipe()))
model.save_pretrained(Path(sys.argv[2]) / "out")
"""


class Pipe:
    """Tells the parent of every step, and waits for its word to go on."""

    def progress(self, done: int, _total: int, _message: str = "") -> None:
        print(done, flush=True)  # noqa: T201
        sys.stdin.readline()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Not told."""


class Recorder:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.rows: dict[int, dict[str, float]] = {}

    def progress(self, done: int, _total: int, _message: str = "") -> None:
        self.steps.append(done)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.rows[step] = dict(values)


def mixture(sequence_length: int = 16) -> Mixture:
    generator = np.random.default_rng(0)
    domains = {name: PackedTokens.of(generator.integers(0, 64, 600).astype(np.uint16)) for name in ("code", "math")}
    return Mixture(domains, sequence_length, seed=0)


def model_of(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "dense":
        return LlamaForCausalLM(LlamaConfig(**SHAPE))
    return MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, sliding_window=None))


def job_in(folder: Path, reporter: object = None) -> Job:
    (folder / "out").mkdir(parents=True, exist_ok=True)
    (folder / "scratch").mkdir(exist_ok=True)
    return Job(out=folder / "out", scratch=folder / "scratch", reporter=reporter or Recorder())  # type: ignore[arg-type]


def train_any(model: PreTrainedModel, config: TrainingConfig, job: Job) -> None:
    if isinstance(model, LlamaForCausalLM):
        train(model, mixture(), config, job=job, trainable=lambda _: True)
        return
    context = Context(model, [["code", "math", "prose", "seed"]] * 2, ("code", "math"))
    objective = routing_objective([GlobalBatchLoss(), ZLoss()], context)
    train(model, mixture(), config, job=job, trainable=lambda _: True, auxiliary=objective)


def start(folder: Path, kind: str, dtype: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(folder), kind, dtype]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run_until(child: subprocess.Popen[str], step: int | None) -> list[int]:
    """Let the child go on until it reports `step`, then kill it with SIGKILL; None: until it ends."""
    assert child.stdin
    assert child.stdout
    seen = []
    while line := child.stdout.readline():
        seen.append(int(line))
        if seen[-1] == step:
            os.kill(child.pid, signal.SIGKILL)
            break
        child.stdin.write("on\n")
        child.stdin.flush()
    assert child.wait(timeout=60) == (0 if step is None else -signal.SIGKILL)
    child.stdin.close()
    child.stdout.close()
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtype"), [("dense", "float32"), ("dense", "bfloat16"), ("moe", "float32")])
def test_killed_runs_give_the_same_bytes(tmp_path: Path, kind: str, dtype: str) -> None:
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    children = [start(folder, kind, dtype) for folder in (undisturbed, disturbed)]
    assert run_until(children[0], None) == list(range(1, 13))
    assert run_until(children[1], 2) == [1, 2]
    assert run_until(start(disturbed, kind, dtype), 8) == list(range(1, 9))
    assert run_until(start(disturbed, kind, dtype), None) == list(range(7, 13))
    for name in ("model.safetensors", "history.json"):
        assert file_digest(undisturbed / "out" / name) == file_digest(disturbed / "out" / name), name


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


class InterruptedRunError(Exception):
    """Raised by a reporter in mid-training."""


class Interrupting(Recorder):
    def progress(self, done: int, _total: int, _message: str = "") -> None:
        super().progress(done, _total, _message)
        if done == 8:
            raise InterruptedRunError


@pytest.mark.parametrize("damage", ["truncated", "flipped", "half-written"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, damage: str) -> None:
    whole = model_of("dense")
    train_any(whole, CONFIG, job_in(tmp_path / "whole"))
    with pytest.raises(InterruptedRunError):
        train_any(model_of("dense"), CONFIG, job_in(tmp_path / "again", Interrupting()))
    newest = max((tmp_path / "again/scratch/training").iterdir())
    content = bytearray(newest.read_bytes())
    if damage == "truncated":
        newest.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        newest.write_bytes(content)
    else:
        (newest.parent / "step-00000009.tmp").write_bytes(content[:1000])
    model, reporter = model_of("dense"), Recorder()
    train_any(model, CONFIG, job_in(tmp_path / "again", reporter))
    assert reporter.steps[0] == (7 if damage == "half-written" else 4)
    assert equal(weights(model), weights(whole))
    assert not list(newest.parent.glob("*.tmp"))
    history = [(tmp_path / name / "out/history.json").read_bytes() for name in ("whole", "again")]
    assert history[0] == history[1]


def test_metrics_and_history(tmp_path: Path) -> None:
    reporter = Recorder()
    train_any(model_of("moe"), CONFIG, job_in(tmp_path, reporter))
    assert reporter.steps == list(range(1, 13))
    assert list(reporter.rows) == [5, 10, 12]
    figures = {"loss", "grad_norm", "learning_rate", "load_balancing_loss", "z_loss", "max_violation", "dead_experts"}
    layers = {"expert_load_variation/layer_0", "expert_load_variation/layer_1"}
    assert set(reporter.rows[12]) == figures | layers | {"tokens_per_second", "model_flops_utilization"}
    rows = json.loads((tmp_path / "out/history.json").read_text())["steps"]
    assert [row["step"] for row in rows] == [5, 10, 12]
    assert set(rows[0]) == figures | layers | {"step"}
    assert 1.0 <= rows[0]["load_balancing_loss"] < 4.0
    assert len(list((tmp_path / "scratch/training").iterdir())) == 2


def test_training_learns_and_reports(tmp_path: Path) -> None:
    tokens = PackedTokens.of(np.arange(700, dtype=np.uint16) % 7)
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=4)
    config = TrainingConfig(steps=40, batch_size=4, sequence_length=16, optimizer=optimizer)
    model = model_of("dense")
    result = train(model, Mixture({"a": tokens}, 16, seed=0), config, job=job_in(tmp_path), trainable=lambda _: True)
    assert result.final_loss < 1.0
    assert (result.steps, result.tokens) == (40, 40 * 4 * 16)
    assert result.tokens_per_second == pytest.approx(result.tokens / result.seconds)
    assert not model.training


def test_the_same_call_gives_the_same_weights(tmp_path: Path) -> None:
    one, other = model_of("moe"), model_of("moe")
    train_any(one, CONFIG, job_in(tmp_path / "one"))
    train_any(other, CONFIG, job_in(tmp_path / "other"))
    assert equal(weights(one), weights(other))


def test_frozen_weights_keep_every_bit(tmp_path: Path) -> None:
    model = model_of("moe")
    before = weights(model)
    train(model, mixture(), CONFIG, job=job_in(tmp_path), trainable=is_router_weight)
    after = weights(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{layer}.mlp.gate.weight" for layer in (0, 1)}


def test_a_loss_that_is_not_finite_names_step_and_domains_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    model = model_of("dense")
    broken = model_of("dense")

    class Breaking(Recorder):
        def progress(self, done: int, _total: int, _message: str = "") -> None:
            if done == 7:
                broken.model.norm.weight.data[0] = float("nan")

    with pytest.raises(
        TrainingError, match=r"step 8: the loss is nan. Its batch: code \(windows \d+, \d+\), math \(windows"
    ) as caught:
        train_any(broken, CONFIG, job_in(tmp_path / "run", Breaking()))
    assert "learning_rate" in caught.value.hint
    assert not (tmp_path / "run/out/history.json").exists()
    resumed, reporter = model_of("dense"), Recorder()
    train_any(resumed, CONFIG, job_in(tmp_path / "run", reporter))
    assert reporter.steps[0] == 7
    train_any(model, CONFIG, job_in(tmp_path / "whole"))
    assert equal(weights(model), weights(resumed))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = model_of("dense")
    job = job_in(tmp_path)
    model.config.max_position_embeddings = 8
    with pytest.raises(ConfigError, match="sequence_length: 16"):
        train(model, mixture(), CONFIG, job=job, trainable=lambda _: True)
    strange = Mixture({"a": PackedTokens.of(np.full(600, 99))}, 16, seed=0)
    with pytest.raises(InputError, match="Token id 99"):
        train(model_of("dense"), strange, CONFIG, job=job, trainable=lambda _: True)
