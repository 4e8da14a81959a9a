"""Before the first update: are rows of routing where they belong, do engine and trainer agree, and how far apart are
they by rounding alone?

Routing off by one row looks like any other routing, and trains a model on another token's experts. Replayed one row
off, it must be worse by orders of magnitude; if it is not, the rows are not what they are taken for. In bfloat16
rounding alone is as far off as a model is whose experts are alike, so there the choices themselves are compared.

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
MIN_MISMATCH_FACTOR = 2.0
"""In bfloat16 a shift must at least double the share of choices that are not the trainer's."""
ALIKE = 0.005
"""Share of choices that may change from row to row where routing is the same for nearly all tokens."""
DISAGREEMENT = 1e-4
"""k3 in nats above which two passes in float32 are of two models."""
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
    mismatch_shifted: float | None
    """The same of routing one row off, the better of both directions."""
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
            "preflight/router_mismatch_shifted": self.mismatch_shifted,
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
        return Preflight(k3_off, None, None, f_off, None, 0.0, None, float((off - engine).abs().max()))
    replayed = logprobs(some, Inspection(), replay=True)
    one_off, mismatches = [], []
    for rows in (1, -1):
        off_by, unreplayed = shift(some, rows), Inspection()
        one_off.append(k3_divergence(logprobs(off_by, Inspection(), replay=True), engine))
        logprobs(off_by, unreplayed, replay=False)
        mismatches.append(unreplayed.router_mismatch)
    return Preflight(
        k3_off,
        k3_divergence(replayed, engine),
        min(one_off),
        f_off,
        extreme_fraction(replayed, engine),
        inspection.router_mismatch,
        min(mismatches),
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


def require_alignment(found: Preflight, *, rollout_dtype: str) -> None:
    """Raise `TrainingError` with the figures unless routing one row off is far worse than routing as it came.

    A model whose routing changes nothing, such as one whose experts are all alike, passes: nothing can go wrong yet.
    """
    if rollout_dtype == "float32" and found.k3_off > DISAGREEMENT:
        raise TrainingError(
            f"Rollout engine and trainer compute different models: with their own routing, k3 is {found.k3_off:.3g} "
            "nats in float32.",
            hint="vLLM does not compute this architecture as transformers does; tell the authors of either.",
        )
    problem = _misplaced(found) if rollout_dtype == "float32" else _misplaced_by_choice(found)
    if problem:
        raise TrainingError(
            f"The engine's routing is not where it belongs: {problem}.",
            hint="Its rows cannot be replayed: set rl.routing to r2 or off, or use the vLLM that Moestro is locked to.",
        )


def _misplaced(found: Preflight) -> str:
    """What speaks against the rows where all but misplaced rows is float32's rounding; empty if nothing does."""
    assert found.k3_replayed is not None
    assert found.k3_shifted is not None
    without_effect = max(found.k3_shifted, found.k3_replayed, found.k3_off) <= ROUNDING
    if without_effect or found.k3_shifted >= MIN_SHIFT_FACTOR * max(found.k3_replayed, ROUNDING / MIN_SHIFT_FACTOR):
        return ""
    return (
        f"replayed as it came, k3 is {found.k3_replayed:.3g} nats; one row off, {found.k3_shifted:.3g}, where at least "
        f"{MIN_SHIFT_FACTOR:g} times as much is due (without replay: {found.k3_off:.3g})"
    )


def _misplaced_by_choice(found: Preflight) -> str:
    """The same by whose experts the trainer's router would have chosen itself."""
    assert found.mismatch_shifted is not None
    as_came, shifted = found.router_mismatch, found.mismatch_shifted
    if as_came <= shifted and (shifted >= MIN_MISMATCH_FACTOR * as_came or shifted <= ALIKE):
        return ""
    return (
        f"{as_came:.2%} of its choices are not the trainer's as they came, {shifted:.2%} one row off, where at least "
        f"{MIN_MISMATCH_FACTOR:g} times as many are due"
    )
