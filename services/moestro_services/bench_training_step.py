"""Whole optimiser steps for `moestro bench training`: Moestro's training against a plain transformers and PyTorch loop.

Both begin at the same weights and see the same batches. The plain loop is what one writes with transformers: the model
called with labels, autocast for bfloat16, `clip_grad_norm_` and `torch.optim.AdamW`, all with their defaults, and
transformers' own experts.

Shapes: T tokens of a step, D hidden, E experts.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moestro.config import ModelConfig, OptimizerConfig
from moestro.data.packed import Batch, Mixture, PackedTokens
from moestro.models.families import FAMILIES, MoeShape
from moestro.models.routers import experts, feed_forwards, parameter_counts, routers
from moestro.seeding.pretrain import build_model
from moestro.training.attention import training_attention
from moestro.training.auxiliary import Auxiliary
from moestro.training.linear import training_linear
from moestro.training.objective import backward
from moestro.training.optimizer import build_optimizer
from moestro.training.runtime import deterministic
from moestro_kernels import experts_mlp
from moestro_kernels.timing import Timing, interleaved

OURS = "moestro"
DEFAULT = "grouped_mm"
"""What transformers takes for experts if one says nothing."""
NUM_BATCHES = 4
PLANNED_STEPS = 1000
ROUTER_STD = 0.02


@dataclass(frozen=True)
class Workload:
    """A dense seed, what a step trains it on, and the experts of its Mixture-of-Experts (0: the seed itself)."""

    name: str
    model: ModelConfig
    batch_size: int
    sequence_length: int
    num_experts: int = 0
    top_k: int = 2

    @property
    def tokens(self) -> int:
        """T."""
        return self.batch_size * self.sequence_length

    def __str__(self) -> str:
        kind = f"{self.num_experts} experts top-{self.top_k}" if self.num_experts else "dense"
        return f"step, {self.name}, {kind}, T={self.tokens}"


@dataclass(frozen=True)
class StepTimes:
    """Timings of Moestro's step and of the plain loop by experts implementation."""

    timings: dict[str, Timing]
    flops: float
    """Floating-point operations of a step in products with weights: 6 per active parameter and token."""
    loss_difference: float
    """Between the two loops' losses of the first batch, nats, before any update."""


def measure_step(workload: Workload, dtype: torch.dtype, *, seconds: float, rounds: int) -> StepTimes:
    """Steps of all loops in turn, for about `seconds` and at least `rounds` rounds."""
    experts_mlp.register()
    mixture = _mixture(workload)
    batches = [mixture.batch(step, workload.batch_size) for step in range(NUM_BATCHES)]
    ours, plain = _model(workload), _model(workload)
    first: dict[str, float] = {}
    with (
        training_attention(ours, dtype=dtype, positions=workload.sequence_length),
        training_linear(ours, dtype=dtype),
    ):
        runs = {OURS: _in_turn(moestro_step(ours, dtype), batches, OURS, first)}
        optimizer = torch.optim.AdamW(plain.parameters(), lr=OptimizerConfig().learning_rate)
        for name in (DEFAULT, "eager") if workload.num_experts else (DEFAULT,):
            runs[name] = _in_turn(_plain_step(plain, optimizer, dtype, name), batches, name, first)
        timings = interleaved(runs, seconds=seconds, min_rounds=rounds)
    flops = 6.0 * parameter_counts(ours)["active_parameters"] * workload.tokens
    return StepTimes(timings, flops, abs(first[OURS] - first[DEFAULT]))


def moestro_step(
    model: PreTrainedModel, dtype: torch.dtype, *, auxiliary: Auxiliary | None = None, accumulation: int = 1
) -> Callable[[Batch], float]:
    """A step of Moestro's training of the parameters that want a gradient; returns the batch's loss in nats."""
    if experts(model):
        model.set_experts_implementation(OURS)
    config = OptimizerConfig()
    optimizer, schedule = build_optimizer(model, config, PLANNED_STEPS)
    taken = count()

    def step(batch: Batch) -> float:
        if auxiliary:
            auxiliary.begin(next(taken), PLANNED_STEPS)
        with deterministic():
            loss = backward(model, batch, accumulation=accumulation, dtype=dtype, auxiliary=auxiliary)
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        if auxiliary:
            auxiliary.end()
        return loss

    return step


def _plain_step(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, dtype: torch.dtype, implementation: str
) -> Callable[[Batch], float]:
    def step(batch: Batch) -> float:
        if experts(model):
            model.set_experts_implementation(implementation)
        inputs_BS, labels_BS = batch.tokens_BS[:, :-1], batch.tokens_BS[:, 1:].contiguous()
        with _autocast(dtype):
            loss = model(input_ids=inputs_BS, labels=labels_BS, shift_labels=labels_BS, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OptimizerConfig().max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def _autocast(dtype: torch.dtype) -> AbstractContextManager[object]:
    return torch.autocast("cpu", dtype=dtype) if dtype == torch.bfloat16 else nullcontext()


def _in_turn(
    step: Callable[[Batch], float], batches: list[Batch], name: str, first: dict[str, float]
) -> Callable[[], None]:
    taken = 0

    def run() -> None:
        nonlocal taken
        loss = step(batches[taken % len(batches)])
        first.setdefault(name, loss)
        taken += 1

    return run


def _mixture(workload: Workload) -> Mixture:
    """Token ids as skewed as text's: the probability of rank r falls with 1 / r."""
    size = workload.model.vocab_size
    share = 1 / np.arange(1, size + 1)
    ids = np.random.default_rng(0).choice(size, size=NUM_BATCHES * workload.tokens + size, p=share / share.sum())
    return Mixture({"text": PackedTokens.of(ids)}, workload.sequence_length, seed=0)


def _model(workload: Workload) -> PreTrainedModel:
    """The seed, or the Mixture-of-Experts whose experts all are its feed-forward networks; the same in every call."""
    seed = build_model(workload.model, seed=0).train()
    if not workload.num_experts:
        return seed
    shape = MoeShape(
        num_experts=workload.num_experts,
        num_experts_per_tok=workload.top_k,
        expert_width=workload.model.intermediate_size,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(FAMILIES["llama"][0].moe_config(seed.config, shape))
    model.load_state_dict(seed.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(0)
    layers: Any = zip(routers(model), experts(model), feed_forwards(seed), strict=True)
    with torch.no_grad():
        for router, sparse, network in layers:
            router.weight.normal_(std=ROUTER_STD, generator=generator)
            sparse.gate_up_proj.copy_(torch.cat([network.gate_proj.weight, network.up_proj.weight]))
            sparse.down_proj.copy_(network.down_proj.weight)
    return model.train()
