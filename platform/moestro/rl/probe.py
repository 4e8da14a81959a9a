"""Do engine and trainer hold the same weights, and are rows of routing where they belong?

A weight refresh can go wrong silently (vLLM 0.30 on a CPU leaves experts packed for other weights: 3 to 4 nats off),
and routing off by one row looks like any other routing. Both show in the log-probabilities of a few sequences.

Shapes: S tokens of a sequence, L layers, K chosen experts.
"""

import numpy as np
import torch
from transformers import PreTrainedModel

from moestro.config import RlConfig
from moestro.errors import TrainingError
from moestro.inference.engine import Engine, Scored
from moestro.models.routing import replay_routes
from moestro.rl.policy import logprobs_of

SEQUENCES = 8
BFLOAT16_TOLERANCE = 0.5
"""In bfloat16 honest differences reach 0.3 nats (one token in thousands); unpacked experts are off by 3 and more."""


def tolerance(config: RlConfig) -> float:
    """Largest difference of log-probabilities that is taken for rounding, in nats."""
    return config.refresh_tolerance if config.rollout_dtype == "float32" else BFLOAT16_TOLERANCE


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


def largest_difference(model: PreTrainedModel, sequences: list[list[int]], scored: list[Scored]) -> float:
    """Largest difference between the trainer's and the engine's log-probabilities, in nats."""
    return max(
        float(np.abs(trainer_logprobs(model, sequence, score.routes) - score.logprobs).max())
        for sequence, score in zip(sequences, scored, strict=True)
    )


def verify_refresh(
    engine: Engine, model: PreTrainedModel, sequences: list[list[int]], config: RlConfig, *, step: int
) -> float:
    """The largest difference on `sequences`; raises `TrainingError` with it if it is above the tolerance."""
    difference = largest_difference(model, sequences, engine.score(sequences))
    require_agreement(difference, config, step=step, what="after the weight refresh")
    return difference


def require_agreement(difference: float, config: RlConfig, *, step: int, what: str) -> None:
    """Raise `TrainingError` with the figures unless `difference` (nats) is within the tolerance."""
    if not difference <= tolerance(config):
        raise TrainingError(
            f"rl step {step}: {what}, rollout engine and trainer differ by up to {difference:.3g} nats in a token's "
            f"log-probability; {tolerance(config):.3g} is allowed (rl.refresh_tolerance).",
            hint="The engine does not run the trainer's weights or routing: its rollouts cannot be trained on.",
        )
