"""`moestro bench losses`: one table over all routing losses on one budget, as LibMoE (arXiv 2411.00918) compares them.

The same mixtures, tuned alike but for the loss: the recipe's, and, for rules that move a correction bias, the same
branches mixed with `selection: loss_free`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from moestro.config import (
    BipBalance,
    DomainSupervision,
    ErcLoss,
    GlobalBatchLoss,
    LossFreeBalance,
    MutualInformationLoss,
    ProfileConfig,
    RandomPartition,
    RomaLoss,
    RoutingLossConfig,
    SwitchLoss,
    UncertainTokens,
    ZLoss,
)
from moestro_flows.home import Home
from moestro_services.upcycling.arms import Arms, Outcome, Scale
from moestro_services.upcycling.bench import SEEDS, full_scale, on_all_seeds, token_folders, workshop_here
from moestro_services.upcycling.clock import Timed, seconds_of
from moestro_services.upcycling.rivals import MIXES, RECIPE
from moestro_services.upcycling.statistics import Interval

NONE, ROMA = "none", "roma"
SOFTMAX: dict[str, tuple[RoutingLossConfig, ...]] = {
    NONE: (),
    "switch": (SwitchLoss(),),
    "global_batch": (GlobalBatchLoss(),),
    "z_loss": (ZLoss(),),
    "erc": (ErcLoss(),),
    ROMA: (RomaLoss(neighbours=1),),
    "mutual_information": (MutualInformationLoss(),),
    "uncertain_tokens": (UncertainTokens(),),
    "random_partition": (RandomPartition(),),
    "domain_supervision": (DomainSupervision(),),
}
NONE_BIASED = "none, sigmoid router"
BIASED: dict[str, tuple[RoutingLossConfig, ...]] = {
    NONE_BIASED: (),
    "loss_free": (LossFreeBalance(),),
    "bip": (BipBalance(),),
}


@dataclass(frozen=True)
class Tuned:
    """What one loss led to from one random seed."""

    outcome: Outcome
    max_violation: float
    dead_experts: int
    specialisation: float
    timed: Timed
    """For whoever measures what a step takes."""


def bench() -> dict[str, Any]:
    """Trains on the seeds and branches of `moestro bench upcycling`."""
    scale = full_scale()
    with workshop_here() as workshop:
        found = on_all_seeds(workshop, scale, SEEDS, runs)
        tokens = token_folders(workshop, scale)
    return report(found, costs(tokens, scale, found))


def costs(tokens: Mapping[str, Path], scale: Scale, found: Mapping[str, Sequence[Tuned]]) -> dict[str, float]:
    """Seconds of a step with each loss, measured alone on the models of the first random seed."""
    timed = {name: rows[0].timed for name, rows in found.items()}
    return seconds_of(timed, tokens, scale, Home.current().path / "bench", what="losses")


def runs(arms: Arms) -> dict[str, Callable[[], Tuned]]:
    """Every loss, by name."""
    changed = {"selection": "loss_free", "router": {"type": "random"}}
    found: dict[str, Callable[[], Tuned]] = {
        name: partial(_run, arms, name, losses) for name, losses in SOFTMAX.items()
    }
    found |= {name: partial(_run, arms, name, losses, **changed) for name, losses in BIASED.items()}
    return found


def _run(arms: Arms, name: str, losses: Sequence[RoutingLossConfig], **changed: Any) -> Tuned:
    recipe = MIXES[RECIPE]
    what = f"{RECIPE} {changed.get('selection', '')}".rstrip()
    model = arms.mix(what, recipe.branches(arms), **({**recipe.mix} | changed))
    accumulation = 1 if name == ROMA else 4  # its neighbours have to be in the same micro-batch
    training = arms.training(steps=arms.scale.tune_steps).model_copy(update={"accumulation": accumulation})
    tuned = arms.tune(name, model, training, losses=tuple(losses))
    config = ProfileConfig(sequence_length=arms.scale.sequence_length, max_tokens=arms.scale.held_out_tokens)
    routing = arms.lab.run("profile", config, name, model=tuned, tokens=arms.tokens).record.result
    shares = [share for share in routing["specialisation"].values() if share is not None]
    return Tuned(
        outcome=arms.outcome(name, tuned, tuned),
        max_violation=routing["max_violation"],
        dead_experts=routing["dead_experts"],
        specialisation=sum(shares) / len(shares),
        timed=Timed(tuned.path, losses=tuple(losses), accumulation=accumulation),
    )


def report(found: Mapping[str, Sequence[Tuned]], seconds: Mapping[str, float]) -> dict[str, Any]:
    """The table and its notes; it has no bounds, for no loss has to win."""
    return {
        "title": f"Routing losses on one budget, {len(found[NONE])} random seeds",
        "columns": [
            "loss",
            "perplexity",
            "MaxVio",
            "dead experts",
            "own expert's share by uniform",
            "step's time by none",
        ],
        "rows": [
            [
                name,
                str(Interval.of([one.outcome.perplexity for one in rows])),
                str(Interval.of([one.max_violation for one in rows])),
                str(Interval.of([float(one.dead_experts) for one in rows])),
                str(Interval.of([one.specialisation for one in rows])),
                f"{seconds[name] / seconds[NONE_BIASED if name in BIASED else NONE]:.2f}",
            ]
            for name, rows in found.items()
        ],
        "bounds": [],
        "notes": [
            "Perplexity: geometric mean over the domains' held-out text. MaxVio and dead experts on the same text.",
            "± is half a 95% interval over random seeds (Student's t). Four micro-batches a step, with roma one.",
            "A step's time: medians of steps in turn on one thread, the recording of routes included.",
        ],
    }
