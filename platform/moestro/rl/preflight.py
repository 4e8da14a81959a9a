"""Before the first update: are rows of routing where they belong, do engine and trainer agree, and how far apart are
they by rounding alone?

Routing off by one row looks like any other routing, and trains a model on another token's experts. Replayed one row
off, it must be worse by orders of magnitude; if it is not, the rows are not what they are taken for.

Shapes: B sequences, S positions, L layers, K chosen experts.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moestro.errors import TrainingError
from moestro.rl.divergence import extreme_fraction, k3_divergence
from moestro.rl.policy import Inspection, inspect
from moestro.rl.rollouts import Rollouts

SEQUENCES = 64
MIN_SHIFT_FACTOR = 100.0
"""A shift by one row must raise k3 by this factor. Of trained models it does by a thousand and more."""
ROUNDING = 1e-9
"""k3 in nats below which two passes are alike to float32's rounding."""


@dataclass(frozen=True)
class Preflight:
    """What was found; k3 in nats per token."""

    k3_off: float
    """Engine against trainer, each with its own routing."""
    k3_replayed: float | None
    """With the engine's routing replayed; None where it returns none."""
    k3_shifted: float | None
    """With the engine's routing one row off, the better of both directions."""
    f_tau2_off: float
    f_tau2_replayed: float | None
    router_mismatch: float
    """Share of (token, layer) pairs in which the trainer's router would have chosen another set of experts."""
    largest_difference: float
    """Of a token's log-probability, nats; with the engine's routing replayed where it returns any."""

    def figures(self) -> dict[str, float]:
        """Those that are known, by metric name."""
        known = {
            "preflight/k3_off": self.k3_off,
            "preflight/k3_replayed": self.k3_replayed,
            "preflight/k3_shifted": self.k3_shifted,
            "preflight/f_tau2_off": self.f_tau2_off,
            "preflight/f_tau2_replayed": self.f_tau2_replayed,
            "preflight/router_mismatch": self.router_mismatch,
        }
        return {name: value for name, value in known.items() if value is not None}


def preflight(model: PreTrainedModel, rollouts: Rollouts, *, temperature: float, micro_batch_size: int) -> Preflight:
    """Measure on up to 64 sequences of `rollouts`, which were sampled with the weights of `model`."""
    some = rollouts.part(0, min(SEQUENCES, len(rollouts)))
    inspection = Inspection()

    def logprobs(part: Rollouts, seen: Inspection, *, replay: bool) -> Tensor:
        return _logprobs(model, part.micro_batches(micro_batch_size), temperature, seen, replay=replay)

    off = logprobs(some, inspection, replay=False)
    engine = some.engine_logprobs_BS[some.mask_BS]
    k3_off, f_off = k3_divergence(off, engine), extreme_fraction(off, engine)
    if some.routes_BSLK is None:
        return Preflight(k3_off, None, None, f_off, None, 0.0, float((off - engine).abs().max()))
    replayed = logprobs(some, Inspection(), replay=True)
    shifted = min(k3_divergence(logprobs(shift(some, rows), Inspection(), replay=True), engine) for rows in (1, -1))
    return Preflight(
        k3_off,
        k3_divergence(replayed, engine),
        shifted,
        f_off,
        extreme_fraction(replayed, engine),
        inspection.router_mismatch,
        float((replayed - engine).abs().max()),
    )


def shift(rollouts: Rollouts, rows: int) -> Rollouts:
    """`rollouts` with the routing of each sequence `rows` later than it belongs, going round at its end."""
    assert rollouts.routes_BSLK is not None
    routes_BSLK = rollouts.routes_BSLK.clone()
    for row, length in enumerate(rollouts.real_BS.sum(dim=1).tolist()):
        routes_BSLK[row, :length] = rollouts.routes_BSLK[row, :length].roll(rows, dims=0)
    return replace(rollouts, routes_BSLK=routes_BSLK)


@torch.no_grad()
def _logprobs(
    model: PreTrainedModel, parts: list[Rollouts], temperature: float, inspection: Inspection, *, replay: bool
) -> Tensor:
    """Of the completions' tokens of all parts, one after another."""
    found = []
    for part in parts:
        logprobs_BS, _ = inspect(model, part, inspection, temperature=temperature, replay=replay)
        found.append(logprobs_BS[part.mask_BS])
    return torch.cat(found)


def require_alignment(found: Preflight) -> None:
    """Raise `TrainingError` with the figures unless replay one row off is far worse than replay as it is.

    A model whose routing changes nothing, such as one whose experts are all alike, passes: nothing can go wrong yet.
    """
    assert found.k3_replayed is not None
    assert found.k3_shifted is not None
    without_effect = max(found.k3_shifted, found.k3_replayed, found.k3_off) <= ROUNDING
    if without_effect or found.k3_shifted >= MIN_SHIFT_FACTOR * max(found.k3_replayed, ROUNDING / MIN_SHIFT_FACTOR):
        return
    raise TrainingError(
        f"The engine's routing is not where it belongs: replayed as it came, k3 is {found.k3_replayed:.3g} nats; one "
        f"row off, {found.k3_shifted:.3g}, where at least {MIN_SHIFT_FACTOR:g} times as much is due (without replay: "
        f"{found.k3_off:.3g}).",
        hint="Its rows cannot be replayed: set rl.routing to r2 or off, or use the vLLM that Moestro is locked to.",
    )
