"""One policy update: old log-probabilities, then the optimiser steps over a batch of rollouts.

Shapes: B sequences, S positions.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moestro.config import RlConfig
from moestro.errors import TrainingError
from moestro.rl.grpo import k3_divergence, policy_loss
from moestro.rl.policy import Inspection, inspect, policy_logprobs, routed
from moestro.rl.rollouts import Rollouts

EXTREME_RATIO = 2.0


@dataclass(frozen=True)
class Learner:
    """The policy and what changes it."""

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    schedule: Any
    config: RlConfig

    @property
    def replay(self) -> bool:
        """Whether the engine's routing is replayed."""
        return self.config.routing == "r3"


def old_logprobs(learner: Learner, rollouts: Rollouts) -> tuple[Tensor, dict[str, float]]:
    """Log-probabilities [B, S] under the policy that sampled, recomputed by the trainer; figures against the engine."""
    config = learner.config
    inspection = Inspection()
    old_BS = torch.zeros_like(rollouts.engine_logprobs_BS)
    row = 0
    for part in rollouts.micro_batches(config.micro_batch_size):
        part_BS = inspect(learner.model, part, inspection, temperature=config.temperature, replay=learner.replay)
        old_BS[row : row + len(part), : part_BS.shape[1]] = part_BS
        row += len(part)
    train, engine = old_BS[rollouts.mask_BS], rollouts.engine_logprobs_BS[rollouts.mask_BS]
    difference = (train - engine).abs()
    figures = {
        "entropy": inspection.mean_entropy,
        "sampling/logp_difference/mean": float(difference.mean()),
        "sampling/logp_difference/max": float(difference.max()),
        "r3/k3_kl": k3_divergence(train, engine),
        "r3/f_tau2": float((difference.exp() > EXTREME_RATIO).double().mean()),
    }
    if rollouts.routes_BSLK is not None:
        figures["r3/router_mismatch"] = inspection.router_mismatch
        figures["r3/used_mismatch"] = inspection.used_mismatch
    return old_BS, figures


def update(learner: Learner, rollouts: Rollouts, old_BS: Tensor, *, step: int) -> dict[str, float]:
    """`config.mini_steps` optimiser steps, each on its own share of the rollouts; returns the means of their figures.

    Raises `TrainingError` naming the step if loss or gradient is not finite; then no weight has been changed by it.
    """
    losses, norms, clipped, row = [], [], 0, 0
    for mini in rollouts.mini_batches(learner.config.mini_steps):
        learner.optimizer.zero_grad(set_to_none=True)
        loss, decided = _accumulate(learner, mini, old_BS[row : row + len(mini)])
        norm = float(torch.nn.utils.clip_grad_norm_(learner.model.parameters(), learner.config.optimizer.max_grad_norm))
        if not torch.isfinite(torch.tensor([loss, norm])).all():
            raise TrainingError(
                f"rl step {step}: loss {loss} or gradient norm {norm} is not finite.",
                hint="Lower rl.optimizer.learning_rate.",
            )
        learner.optimizer.step()
        learner.schedule.step()
        losses.append(loss)
        norms.append(norm)
        clipped += decided
        row += len(mini)
    return {
        "loss": sum(losses) / len(losses),
        "grad_norm": sum(norms) / len(norms),
        "clip_ratio": clipped / rollouts.tokens,
    }


def _accumulate(learner: Learner, mini: Rollouts, old_BS: Tensor) -> tuple[float, int]:
    """Gradients of the token-mean loss over `mini`, in micro-batches; returns the loss and the clipped tokens."""
    loss, clipped, row = 0.0, 0, 0
    for part in mini.micro_batches(learner.config.micro_batch_size):
        part_old_BS = old_BS[row : row + len(part), : part.inputs_BS.shape[1]]
        with routed(learner.model, part, replay=learner.replay):
            logprobs_BS = policy_logprobs(learner.model, part, temperature=learner.config.temperature)
            found = policy_loss(logprobs_BS, part_old_BS, part.advantages_B, part.mask_BS, clip=learner.config.clip)
            (found.total / mini.tokens).backward()
        loss += float(found.total.detach()) / mini.tokens
        clipped += found.clipped
        row += len(part)
    return loss, clipped
