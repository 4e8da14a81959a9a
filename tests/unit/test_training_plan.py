"""Budgets become steps: tokens, FLOPs against PyTorch's own counter, minutes; and what does not fit is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moestro.artifacts import Job
from moestro.config import GlobalBatchLoss, OptimizerConfig, TrainingConfig, ZLoss
from moestro.data.packed import Mixture, PackedTokens
from moestro.errors import ConfigError, InputError
from moestro.models.routers import is_expert_weight
from moestro.training import peak, plan
from moestro.training.flops import attention_flops, training_flops
from moestro.training.history import TrainingResult
from moestro.training.loop import train
from moestro.training.routing_losses import Context, routing_objective

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
GLM = {"first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
S = 16


def model_of(kind: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SHAPE, "sliding_window": None, **changes})
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def mixture(tokens: int = 2000) -> Mixture:
    ids = np.random.default_rng(0).integers(0, 64, tokens).astype(np.uint16)
    return Mixture({"code": PackedTokens.of(ids), "math": PackedTokens.of(ids[::-1])}, S, seed=0)


def run(folder: Path, model: PreTrainedModel, data: Mixture | None = None, **config: Any) -> TrainingResult:
    for name in ("out", "scratch"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    training = TrainingConfig.model_validate({"batch_size": 4, "sequence_length": S, **config})
    job = Job(out=folder / "out", scratch=folder / "scratch")
    return train(model, data or mixture(), training, job=job, trainable=lambda _: True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "a budget is missing: one of steps, tokens, flops, minutes"),
        ({"steps": 3, "minutes": 1}, "steps and minutes are both budgets"),
        ({"tokens": 0}, "greater than or equal to 1"),
        ({"steps": 3, "optimizer": {"warmup_steps": 4}}, "warmup_steps: 4 is more than the run's 3 steps"),
    ],
)
def test_a_budget_is_named_once(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainingConfig.model_validate(given)


def test_the_default_warm_up_suits_any_run() -> None:
    assert TrainingConfig(steps=1).optimizer.warmup == 20
    assert TrainingConfig(steps=3, optimizer=OptimizerConfig(warmup_steps=3)).optimizer.warmup == 3


@pytest.mark.parametrize(
    "kind", ["llama", "qwen3", "olmo2", "mixtral", "qwen2_moe", "qwen3_moe", "granitemoe", "glm4_moe"]
)
def test_flops_are_those_of_pytorchs_counter(kind: str) -> None:
    model = model_of(kind, **(EXPERTS if "m" in kind[2:] else {}), **(GLM if kind == "glm4_moe" else {}))
    model.set_experts_implementation("batched_mm") if hasattr(model, "set_experts_implementation") else None
    tokens_BS = torch.randint(0, 64, (2, S), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens_BS, use_cache=False).logits.float().square().mean().backward()
    causal = attention_flops(model.config, S)
    rotary = 2 * (SHAPE["head_dim"] // 2) / 2  # its frequencies are made by a product, once per row of positions
    full = causal * S / ((S + 1) / 2)  # the counter also counts what the mask hides
    counted = counter.get_total_flops() / tokens_BS.numel()
    assert training_flops(model, S) - causal + full == pytest.approx(counted, abs=rotary)


def test_frozen_weights_have_no_gradient_to_pay_for() -> None:
    model = model_of("mixtral", **EXPERTS)
    whole = training_flops(model, S)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not is_expert_weight(name))
    assert whole - training_flops(model, S) == 2 * 2 * 2 * 3 * 32 * 64  # 2 operations, layers, experts chosen, matrices


def test_a_sliding_window_limits_what_attention_costs() -> None:
    config = AutoConfig.for_model("mistral", **SHAPE, sliding_window=4)
    seen = sum(min(position + 1, 4) for position in range(S)) / S
    assert attention_flops(config, S) == 2 * 12 * 4 * 8 * seen


def test_tokens_and_flops_become_steps(tmp_path: Path) -> None:
    model = model_of("llama")
    result = run(tmp_path / "tokens", model, tokens=4 * S * 2 + 1)
    assert (result.steps, result.tokens) == (3, 3 * 4 * S)
    assert result.flops == training_flops(model, S) * result.tokens
    result = run(tmp_path / "flops", model_of("llama"), flops=training_flops(model, S) * 4 * S * 2.4)
    assert result.steps == 2
    assert 0 < result.mfu < 1.5
    assert result.epochs == {"code": pytest.approx(4 / 124), "math": pytest.approx(4 / 124)}


def test_a_budget_gives_the_bits_of_its_steps(tmp_path: Path) -> None:
    by_tokens, by_steps = model_of("llama"), model_of("llama")
    run(tmp_path / "tokens", by_tokens, tokens=4 * S * 3)
    run(tmp_path / "steps", by_steps, steps=3)
    for one, other in zip(by_tokens.parameters(), by_steps.parameters(), strict=True):
        assert torch.equal(one, other)


def test_minutes_are_timed_once_and_train_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = model_of("mixtral", **EXPERTS)
    monkeypatch.setattr(plan, "_seconds_per_step", timed := Timed(plan._seconds_per_step, 6.0))
    context = Context(slow, [["code", "math", "prose", "seed"]] * 2, ("code", "math"))
    for name in ("out", "scratch"):
        (tmp_path / name).mkdir()
    job = Job(out=tmp_path / "out", scratch=tmp_path / "scratch")
    config = TrainingConfig(minutes=0.5, batch_size=4, sequence_length=S)
    losses = [GlobalBatchLoss(), ZLoss()]
    objective = routing_objective(losses, context)
    given: Any = {"job": job, "trainable": lambda _: True, "auxiliary": objective}
    result = train(slow, mixture(), config, **given)
    assert (result.steps, timed.calls) == (5, 1)
    assert json.loads((job.scratch / "plan.json").read_text())["steps"] == 5
    again = model_of("mixtral", **EXPERTS)
    objective = routing_objective(losses, Context(again, context.origins, context.domains))
    assert train(again, mixture(), config, **{**given, "auxiliary": objective}).steps == 5
    assert timed.calls == 1
    fixed = model_of("mixtral", **EXPERTS)
    context = Context(fixed, [["code", "math", "prose", "seed"]] * 2, ("code", "math"))
    (tmp_path / "fixed/out").mkdir(parents=True)
    (tmp_path / "fixed/scratch").mkdir()
    job = Job(out=tmp_path / "fixed/out", scratch=tmp_path / "fixed/scratch")
    train(
        fixed,
        mixture(),
        TrainingConfig(steps=5, batch_size=4, sequence_length=S),
        job=job,
        trainable=lambda _: True,
        auxiliary=routing_objective([GlobalBatchLoss(), ZLoss()], context),
    )
    for one, other in zip(slow.parameters(), fixed.parameters(), strict=True):
        assert torch.equal(one, other)
    other = config.model_copy(update={"minutes": 0.4})
    with pytest.raises(InputError, match="another config, model or data"):
        train(fixed, mixture(), other, job=Job(out=job.out, scratch=tmp_path / "scratch"), trainable=lambda _: True)


def test_timing_leaves_no_trace() -> None:
    model = torch.nn.BatchNorm1d(4)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    seen = []

    def batch(number: int) -> None:
        seen.append(number)
        model(torch.rand(8, 4)).sum().backward()

    assert plan._seconds_per_step(model, batch) > 0  # type: ignore[arg-type]
    assert seen == [0, 1, 2]
    assert torch.equal(torch.rand(2), expected)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(model.state_dict()["running_mean"], torch.zeros(4))


class Timed:
    """Times for real, and answers what it is told."""

    def __init__(self, time: Any, answer: float) -> None:
        self.time, self.answer, self.calls = time, answer, 0

    def __call__(self, *arguments: Any) -> float:
        self.calls += 1
        assert self.time(*arguments) > 0
        return self.answer


def test_a_warm_up_beyond_the_budget_is_refused(tmp_path: Path) -> None:
    flops = training_flops(model_of("llama"), S) * 4 * S * 2
    with pytest.raises(ConfigError, match="warmup_steps: 3 is more than the run's 2 steps"):
        run(tmp_path, model_of("llama"), flops=flops, optimizer={"warmup_steps": 3})


def test_a_domain_that_runs_out_is_refused_before_the_first_step(tmp_path: Path) -> None:
    small = mixture(S * 2 + 1)
    with pytest.raises(ConfigError, match=r"'code' runs out of data: 3 steps would go through its 33 tokens 3.0 times"):
        run(tmp_path, model_of("llama"), small, steps=3, max_epochs=2.5)
    endless = r"'code' runs out of data: \d\.\de\+2\d\d steps would go through its 33 tokens \d\.\de\+2\d\d times"
    with pytest.raises(ConfigError, match=endless):
        run(tmp_path, model_of("llama"), small, flops=1e300)
    assert run(tmp_path, model_of("llama"), small, steps=3, max_epochs=3).epochs == {"code": 3.0, "math": 3.0}


def test_the_peak_is_measured_once() -> None:
    first = peak.matmul_peak(torch.float32)
    assert first > 1e8
    assert peak.matmul_peak(torch.float32) == first
