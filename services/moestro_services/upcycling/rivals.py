"""The rivals of `moestro bench upcycling`, by the name under which the table lists them."""

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from moestro.artifacts import Artifact
from moestro_services.upcycling.arms import ENSEMBLES, Arms, Outcome, Trainable, flops_of
from moestro_services.upcycling.soup import soup

SEED, DENSE, DENSE_CLOCK, SPARSE = (
    "seed",
    "dense, equal FLOPs",
    "dense, equal wall clock",
    "sparse upcycling, equal FLOPs",
)
PUBLISHED, RECIPE, UNTRAINED = "BTX as published", "Moestro's recipe", "FFN-only branches, centroid router, untrained"
BEST_BRANCH = "best single branch"
CLOCK_ROUNDING = 10
"""Steps of dense training are rounded up to so many, so that a run again asks for the same."""
RANDOM: dict[str, Any] = {"type": "random"}
CENTROID: dict[str, Any] = {"type": "centroid"}
WIDE_CENTROID = CENTROID | {"spread": 5.0}


def _rest(**method: Any) -> dict[str, dict[str, Any]]:
    return dict.fromkeys(("attention", "norms", "embeddings"), method)


MEAN = _rest(type="mean", include_seed=True)
"""Branch-Train-MiX (arXiv 2403.07816): the mean of all models, the seed among them."""


@dataclass(frozen=True)
class Recipe:
    """How branches are trained, mixed and tuned."""

    trainable: Trainable
    """Which weights of the branches train."""
    mix: Mapping[str, Any]
    """Fields of `mix`."""
    part: float = 1.0
    """Share of the scale's branch steps; what is left over goes into tuning."""
    rate: float = 1.0
    """Of the branches, by the scale's learning rate."""

    def branches(self, arms: Arms) -> dict[str, Artifact]:
        """By domain."""
        return arms.branches(self.trainable, part=self.part, rate=self.rate)


MIXES: dict[str, Recipe] = {
    PUBLISHED: Recipe("all", {"rest": MEAN, "router": RANDOM}),
    "BTX, TIES": Recipe("all", {"rest": _rest(type="ties"), "router": RANDOM}),
    "BTX, DARE": Recipe("all", {"rest": _rest(type="dare"), "router": RANDOM}),
    "BTX, centroid router": Recipe("all", {"rest": MEAN, "router": CENTROID}),
    "BTX, ERC router": Recipe("all", {"rest": MEAN, "router": {"type": "erc"}}),
    "BTX, FFN-only branches": Recipe("ffn", {"router": RANDOM}),
    "BTX, FFN-only branches, centroid router": Recipe("ffn", {"router": WIDE_CENTROID}),
    "DivMoE's slices": Recipe(
        "all", {"rest": MEAN, "router": RANDOM, "experts": {"type": "divmoe"}, "num_experts_per_tok": 4}
    ),
    RECIPE: Recipe("ffn", {"router": WIDE_CENTROID}, part=1 / 12, rate=6.0),
}


def rivals(arms: Arms) -> dict[str, Callable[[], Outcome]]:
    """What each does, once called; those that are called while others still train wait for what they need."""
    return {
        SEED: lambda: arms.outcome(SEED, arms.seed),
        DENSE: lambda: _dense(arms, DENSE, flops=budget(arms)),
        **{f"branch {name}": partial(_branch, arms, name) for name in arms.scale.domains},
        **{f"Branch-Train-Merge, top-{top_k}": partial(_ensemble, arms, top_k) for top_k in ENSEMBLES},
        "weight soup": lambda: _soup(arms),
        SPARSE: lambda: _sparse(arms),
        UNTRAINED: lambda: _untrained(arms),
        **{name: partial(_mixed, arms, name) for name in MIXES},
    }


def budget(arms: Arms) -> float:
    """Model FLOPs that BTX as published spends: its branches, and the steps of its tuning."""
    branches, tuned = _published(arms)
    return flops_of(*branches.values(), tuned)


def recipe_tuned(arms: Arms, **fields: Any) -> Artifact:
    """The model that Moestro's recipe ends with, where `fields` of its tuning are as given."""
    return _tuned(arms, RECIPE, **fields)[1]


def sparse_tuned(arms: Arms) -> Artifact:
    """The model that sparse upcycling ends with."""
    count = len(arms.tokens) + 1
    model = arms.mix(SPARSE, {}, experts={"type": "sparse_upcycling", "num_experts": count}, router=RANDOM)
    return arms.tune(SPARSE, model, arms.training(flops=budget(arms)))


def _published(arms: Arms) -> tuple[dict[str, Artifact], Artifact]:
    recipe = MIXES[PUBLISHED]
    branches = recipe.branches(arms)
    model, training = arms.mix(PUBLISHED, branches, **recipe.mix), arms.training(steps=arms.scale.tune_steps)
    return branches, arms.tune(PUBLISHED, model, training)


def _mixed(arms: Arms, name: str) -> Outcome:
    branches, tuned = _tuned(arms, name)
    return arms.outcome(name, tuned, *branches.values(), tuned)


def _tuned(arms: Arms, name: str, **fields: Any) -> tuple[dict[str, Artifact], Artifact]:
    """Branches and the tuned mix; nothing is evaluated, for other rivals wait for what this one costs."""
    if name == PUBLISHED:
        return _published(arms)
    recipe = MIXES[name]
    branches = recipe.branches(arms)
    left = budget(arms) - flops_of(*branches.values())
    model, training = arms.mix(name, branches, **recipe.mix), arms.training(flops=left)
    return branches, arms.tune(name, model, training, **fields)


def _untrained(arms: Arms) -> Outcome:
    branches = arms.branches("ffn")
    return arms.outcome(UNTRAINED, arms.mix(UNTRAINED, branches, router=CENTROID), *branches.values())


def _dense(arms: Arms, what: str, **training: float) -> Outcome:
    model = arms.dense(what, **training)
    return arms.outcome(what, model, model)


def dense_by_clock(arms: Arms, steps: Mapping[str, float]) -> Outcome:
    """Dense training on one worker for as long as the recipe takes on its workers; see `Outcome.seconds`."""
    per_step = steps[_dense(arms, DENSE, flops=budget(arms)).work[0].kind]
    count = _mixed(arms, RECIPE).seconds(steps) / per_step
    return _dense(arms, DENSE_CLOCK, steps=CLOCK_ROUNDING * math.ceil(count / CLOCK_ROUNDING))


def _branch(arms: Arms, name: str) -> Outcome:
    branch = arms.branches("all")[name]
    return arms.outcome(f"branch {name}", branch, branch)


def _ensemble(arms: Arms, top_k: int) -> Outcome:
    return arms.ensemble(arms.branches("all"), top_k)


def _soup(arms: Arms) -> Outcome:
    branches = arms.branches("all")
    with tempfile.TemporaryDirectory() as folder:
        model = soup([branch.path for branch in branches.values()], Path(folder) / "soup")
        return arms.outcome("weight soup", model, *branches.values())


def _sparse(arms: Arms) -> Outcome:
    tuned = sparse_tuned(arms)
    return arms.outcome(SPARSE, tuned, tuned)
