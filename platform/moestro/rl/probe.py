"""Do engine and trainer hold the same weights?

A weight refresh can go wrong silently (vLLM 0.30 on a CPU leaves experts packed for other weights: 3 to 4 nats off).
It shows in the log-probabilities of a few sequences, which both compute with the very same weights: what differs here
is mismatch, never staleness.

Shapes: S tokens of a sequence, L layers, K chosen experts.
"""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from moestro.config import RlConfig
from moestro.errors import TrainingError
from moestro.inference.engine import Engine, Scored
from moestro.models.routing import replay_routes
from moestro.rl.divergence import k3_divergence
from moestro.rl.policy import logprobs_of

SEQUENCES = 8
BFLOAT16_K3 = 0.02
"""Nats per token. In bfloat16 one honest token in thousands is off by more than half a nat, when its route changes,
so the mean has to tell: honest ones are below 7e-3 even where routing is fragile (`moestro bench r3-parity`)."""


@dataclass(frozen=True)
class Agreement:
    """Engine against trainer on some sequences."""

    largest_difference: float
    """Of a token's log-probability, nats."""
    k3: float
    """Nats per token."""

    def figures(self) -> dict[str, float]:
        """By metric name."""
        return {"sync/max_abs_dlogp": self.largest_difference, "sync/k3_kl": self.k3}


def pick(sequences: list[list[int]], *, max_length: int) -> list[list[int]]:
    """Up to eight of `sequences`, evenly spread, cut to `max_length` tokens."""
    stride = max(1, len(sequences) // SEQUENCES)
    return [sequence[:max_length] for sequence in sequences[::stride][:SEQUENCES]]


@torch.no_grad()
def trainer_logprobs(model: PreTrainedModel, sequence: list[int], routes_SLK: np.ndarray | None) -> np.ndarray:
    """float32 [S-1] log-probabilities of tokens 1 to S-1, routed as `routes_SLK` says if it is given."""
    tokens_1S = torch.tensor([sequence])
    if routes_SLK is None:
        logits_1SV = model(input_ids=tokens_1S[:, :-1], use_cache=False).logits
    else:
        routes_TLK = torch.from_numpy(routes_SLK[: len(sequence) - 1].astype(np.int64))
        with replay_routes(model, routes_TLK):
            logits_1SV = model(input_ids=tokens_1S[:, :-1], use_cache=False).logits
    logprobs: np.ndarray = logprobs_of(logits_1SV.float(), tokens_1S[:, 1:])[0].numpy()
    return logprobs


def agreement(model: PreTrainedModel, sequences: list[list[int]], scored: list[Scored]) -> Agreement:
    """How far the trainer is from what the engine has `scored`."""
    ours = [trainer_logprobs(model, sequence, score.routes) for sequence, score in zip(sequences, scored, strict=True)]
    train, engine = np.concatenate(ours), np.concatenate([score.logprobs for score in scored])
    return Agreement(
        float(np.abs(train - engine).max()), k3_divergence(torch.from_numpy(train), torch.from_numpy(engine))
    )


def verify_refresh(
    engine: Engine, model: PreTrainedModel, sequences: list[list[int]], config: RlConfig, *, step: int
) -> Agreement:
    """Engine against trainer on `sequences`; raises `TrainingError` with the figures if above the tolerance."""
    found = agreement(model, sequences, engine.score(sequences))
    require_agreement(found, config, step=step, what="after the weight refresh")
    return found


def require_agreement(found: Agreement, config: RlConfig, *, step: int, what: str) -> None:
    """Raise `TrainingError` with the figures unless what `found` says is rounding.

    In float32 that is a largest difference within `rl.refresh_tolerance`; in bfloat16 a k3 within `BFLOAT16_K3`.
    """
    if config.rollout_dtype == "float32":
        ok = found.largest_difference <= config.refresh_tolerance
        allowed = f"differences up to {config.refresh_tolerance:.3g} nats (rl.refresh_tolerance)"
    else:
        ok, allowed = found.k3 <= BFLOAT16_K3, f"a k3 of {BFLOAT16_K3:.3g} nats"
    if not ok:
        raise TrainingError(
            f"rl step {step}: {what}, rollout engine and trainer differ by up to {found.largest_difference:.3g} nats "
            f"in a token's log-probability, k3 {found.k3:.3g} nats; rounding makes {allowed}.",
            hint="The engine does not run the trainer's weights or routing: its rollouts cannot be trained on.",
        )
