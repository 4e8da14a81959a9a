"""`moestro bench upcycling-pretrained`: the recipe from a real pre-trained model, SmolLM2-135M, on three domains.

A shorter list than that of `moestro bench upcycling`, from one random seed: what is asked here is whether one mixture
is as good on every domain as the domain's own specialist. Results are kept in the home's folder `bench`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from moestro.config import load_lifecycle
from moestro_services.upcycling.arms import Arms, Outcome, Scale, Trainable
from moestro_services.upcycling.bench import clock, on_all_seeds, token_folders, workshop_here
from moestro_services.upcycling.rivals import DENSE, RECIPE, SEED, SPARSE, UNTRAINED, rivals

CONFIG = Path("examples/smollm2.yaml")
SEEDS = (0,)
WIDER: dict[Trainable, str] = {"all": "branch {name}", "ffn": "branch {name}, FFN only"}
BESIDE_SPECIALIST = 1.01
"""Largest ratio of the recipe's loss to the best single branch's, on the branch's own domain."""


def bench() -> dict[str, Any]:
    """The first run trains everything; a later one only measures again."""
    scale = Scale(
        load_lifecycle(CONFIG),
        branch_steps=24,
        tune_steps=24,
        batch_size=4,
        learning_rate=1e-4,
        held_out_tokens=16_384,
    )
    with workshop_here() as workshop:
        found = on_all_seeds(workshop, scale, SEEDS, shorter_list)
        tokens = token_folders(workshop, scale)
    outcomes = {name: outcomes[0] for name, outcomes in found.items()}
    return report(outcomes, clock(tokens, scale, list(outcomes.values())))


def shorter_list(arms: Arms) -> dict[str, Callable[[], Outcome]]:
    """What is compared, by name."""
    all_of_them = rivals(arms)
    branches = {
        named.format(name=name): partial(_branch, arms, trainable, name)
        for trainable, named in WIDER.items()
        for name in arms.scale.domains
    }
    names = (SEED, DENSE, *branches, SPARSE, "BTX as published", UNTRAINED, RECIPE)
    return {name: branches.get(name) or all_of_them[name] for name in names}


def _branch(arms: Arms, trainable: Trainable, name: str) -> Outcome:
    branch = arms.branches(trainable)[name]
    return arms.outcome(WIDER[trainable].format(name=name), branch, branch)


def report(found: Mapping[str, Outcome], steps: Mapping[str, float]) -> dict[str, Any]:
    """The table, its bounds and notes."""
    recipe, seed = found[RECIPE], found[SEED]
    domains = list(recipe.losses)
    specialists = {
        domain: min(outcome.losses[domain] for name, outcome in found.items() if name.startswith("branch "))
        for domain in domains
    }
    return {
        "title": "Recipes on one budget from SmolLM2-135M",
        "columns": ["rival", *domains, "perplexity (geometric mean)", "PFLOP", "wall clock, s"],
        "rows": [
            [
                name,
                *(f"{outcome.losses[domain]:.3f}" for domain in domains),
                f"{outcome.perplexity:.3f}",
                f"{outcome.flops / 1e15:.3f}",
                f"{outcome.seconds(steps):.0f}",
            ]
            for name, outcome in found.items()
        ],
        "bounds": [
            bound
            for domain in domains
            for bound in (
                _bound(f"{domain}: recipe's loss by the best single branch's", recipe, domain, specialists[domain]),
                _bound(f"{domain}: recipe's loss by the seed's", recipe, domain, seed.losses[domain], limit=1.0),
            )
        ],
        "notes": [
            "Held-out loss by domain in nats per token; one random seed, hence no intervals.",
            "FLOPs are model FLOPs of training after the seed. Wall clock: steps by what one takes, timed alone; "
            "branches side by side, a core each.",
            "Equal FLOPs: those of BTX as published, for the recipe too, whose tuning takes what its branches left.",
        ],
    }


def _bound(
    what: str, outcome: Outcome, domain: str, other: float, *, limit: float = BESIDE_SPECIALIST
) -> dict[str, Any]:
    ratio = outcome.losses[domain] / other
    return {"what": what, "value": ratio, "limit": f"<= {limit}", "ok": ratio <= limit}
