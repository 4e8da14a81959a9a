"""One policy update: what is known before the first optimiser step, then the steps over a batch of rollouts.

Shapes: B sequences, S positions, L layers, K chosen experts.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moestro.config import RlConfig
from moestro.errors import TrainingError
from moestro.models.layouts import routed_experts
from moestro.rl.correction import importance_weights
from moestro.rl.divergence import extreme_fraction, k3_divergence, penalty
from moestro.rl.objectives import OBJECTIVES, Tokens
from moestro.rl.policy import Inspection, inspect, policy_logprobs, recomputing, routed
from moestro.rl.rollouts import Rollouts
from moestro.rl.routing import Mode


@dataclass(frozen=True)
class Learner:
    """The policy and what changes it."""

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    schedule: Any
    config: RlConfig
    mode: Mode
    """Whose routing is replayed."""
    reference: PreTrainedModel | None = None
    """The model that the stage began with, where there is a KL penalty. It routes for itself."""


def prepare(learner: Learner, rollouts: Rollouts) -> tuple[Rollouts, dict[str, float]]:
    """`rollouts` with old and reference log-probabilities, importance weights and the routes to be replayed in the
    update; and figures of engine against trainer."""
    config = learner.config
    inspection = Inspection()
    old_BS = torch.zeros_like(rollouts.engine_logprobs_BS)
    own, row = None, 0
    for part in rollouts.micro_batches(config.micro_batch_size):
        found_BS, used_BSLK = inspect(
            learner.model, part, inspection, temperature=config.temperature, replay=learner.mode == "r3"
        )
        old_BS[row : row + len(part), : found_BS.shape[1]] = found_BS
        if learner.mode == "r2" and used_BSLK is not None:
            own = _grown(own, rollouts, used_BSLK)
            own[row : row + len(part), : found_BS.shape[1]] = used_BSLK
        row += len(part)
    known = replace(
        rollouts,
        old_logprobs_BS=old_BS,
        importance_BS=_importance(learner, rollouts, old_BS),
        reference_logprobs_BS=_reference(learner, rollouts),
        routes_BSLK=own if learner.mode == "r2" else rollouts.routes_BSLK,
    )
    return known, _figures(
        rollouts, old_BS, inspection, routed_experts(learner.model.config.to_dict())
    ) | _importance_figures(known)


def _grown(own: Tensor | None, rollouts: Rollouts, part_BSLK: Tensor) -> Tensor:
    """Routes of the whole batch, to be filled part by part; padding has distinct ids."""
    if own is not None:
        return own
    padding_K = torch.arange(part_BSLK.shape[-1])
    return padding_K.expand(*rollouts.inputs_BS.shape, *part_BSLK.shape[2:]).clone()


def _importance(learner: Learner, rollouts: Rollouts, old_BS: Tensor) -> Tensor | None:
    correction = learner.config.correction
    if correction is None:
        return None
    return importance_weights(correction, old_BS, rollouts.engine_logprobs_BS, rollouts.mask_BS)


@torch.no_grad()
def _reference(learner: Learner, rollouts: Rollouts) -> Tensor | None:
    if learner.reference is None:
        return None
    config, reference_BS, row = learner.config, torch.zeros_like(rollouts.engine_logprobs_BS), 0
    for part in rollouts.micro_batches(config.micro_batch_size):
        part_BS = policy_logprobs(learner.reference, part, temperature=config.temperature)
        reference_BS[row : row + len(part), : part_BS.shape[1]] = part_BS
        row += len(part)
    return reference_BS


def _figures(rollouts: Rollouts, old_BS: Tensor, inspection: Inspection, experts: int) -> dict[str, float]:
    train, engine = old_BS[rollouts.mask_BS], rollouts.engine_logprobs_BS[rollouts.mask_BS]
    difference = (train - engine).abs()
    figures = {
        "entropy": inspection.mean_entropy,
        "sampling/logp_difference/mean": float(difference.mean()),
        "sampling/logp_difference/max": float(difference.max()),
        "r3/k3_kl": k3_divergence(train, engine),
        "r3/f_tau2": extreme_fraction(train, engine),
    }
    if rollouts.routes_BSLK is not None:
        figures["r3/router_mismatch"] = inspection.router_mismatch
        figures["r3/used_mismatch"] = inspection.used_mismatch
        figures["r3/rows"] = float(rollouts.real_BS.sum())
        figures["r3/bytes_per_token"] = float(rollouts.routes_BSLK[0, 0].numel() * _bytes(experts))
        for layer, share in enumerate(inspection.layer_mismatches()):
            figures[f"r3/router_mismatch/layer_{layer}"] = share
    return figures


def _bytes(experts: int) -> int:
    """Of the type in which the engine returns ids of so many experts."""
    return 1 if experts <= 256 else 2


def _importance_figures(rollouts: Rollouts) -> dict[str, float]:
    if rollouts.importance_BS is None:
        return {}
    weights = rollouts.importance_BS[rollouts.mask_BS]
    return {
        "sampling/importance_sampling_ratio/min": float(weights.min()),
        "sampling/importance_sampling_ratio/mean": float(weights.mean()),
        "sampling/importance_sampling_ratio/max": float(weights.max()),
    }


@dataclass
class _Sums:
    """Over the tokens of all optimiser steps of an update."""

    loss: float = 0.0
    kl: float = 0.0
    low: int = 0
    high: int = 0


def update(learner: Learner, rollouts: Rollouts, *, step: int) -> dict[str, float]:
    """`config.mini_steps` optimiser steps, each on its own share of the prepared rollouts; means of their figures.

    Raises `TrainingError` naming the step if loss or gradient is not finite; then no weight has been changed by it.
    """
    sums, norms = _Sums(), []
    for mini in rollouts.mini_batches(learner.config.mini_steps):
        learner.optimizer.zero_grad(set_to_none=True)
        before = sums.loss
        accumulate(learner, mini, sums)
        loss = sums.loss - before
        norm = float(torch.nn.utils.clip_grad_norm_(learner.model.parameters(), learner.config.optimizer.max_grad_norm))
        if not torch.isfinite(torch.tensor([loss, norm])).all():
            raise TrainingError(
                f"rl step {step}: loss {loss} or gradient norm {norm} is not finite.",
                hint="Lower rl.optimizer.learning_rate.",
            )
        learner.optimizer.step()
        learner.schedule.step()
        norms.append(norm)
    tokens = rollouts.tokens
    figures = {
        "loss": sums.loss / len(norms),
        "grad_norm": sum(norms) / len(norms),
        "clip_ratio/low_mean": sums.low / tokens,
        "clip_ratio/high_mean": sums.high / tokens,
        "clip_ratio/region_mean": (sums.low + sums.high) / tokens,
    }
    return figures | ({"kl": sums.kl / tokens} if learner.reference is not None else {})


def accumulate(learner: Learner, mini: Rollouts, sums: _Sums | None = None) -> _Sums:
    """Add the gradients of the loss over `mini` to `.grad`, in micro-batches; adds loss and figures to `sums`."""
    config, sums, row = learner.config, sums or _Sums(), 0
    objective = OBJECTIVES[config.algorithm.type]
    weights_BS = objective.weights(mini.mask_BS, config.max_tokens)
    for part in mini.micro_batches(config.micro_batch_size):
        part_weights_BS = weights_BS[row : row + len(part), : part.inputs_BS.shape[1]]
        with (
            recomputing(learner.model, enabled=config.activation_checkpointing),
            routed(learner.model, part, replay=learner.mode != "off"),
        ):
            loss = _loss(learner, objective.surrogate, part, part_weights_BS, sums)
            loss.backward()
        sums.loss += float(loss.detach())
        row += len(part)
    return sums


def _loss(learner: Learner, surrogate: Callable[..., Any], part: Rollouts, weights_BS: Tensor, sums: _Sums) -> Tensor:
    """The micro-batch's share of the loss, attached to the graph."""
    config = learner.config
    assert part.old_logprobs_BS is not None
    logprobs_BS = policy_logprobs(learner.model, part, temperature=config.temperature)
    found = surrogate(config.algorithm, Tokens(logprobs_BS, part.old_logprobs_BS, part.advantages_B, part.mask_BS))
    loss_BS = found.loss_BS if part.importance_BS is None else found.loss_BS * part.importance_BS
    if config.kl is not None:
        assert part.reference_logprobs_BS is not None
        kl_BS = penalty(logprobs_BS, part.reference_logprobs_BS, config.kl.estimator)
        loss_BS = loss_BS + config.kl.coefficient * kl_BS
        sums.kl += float(kl_BS.detach()[part.mask_BS].sum())
    sums.low += int((found.low_BS & part.mask_BS).sum())
    sums.high += int((found.high_BS & part.mask_BS).sum())
    return torch.where(part.mask_BS, loss_BS * weights_BS, 0.0).sum()
