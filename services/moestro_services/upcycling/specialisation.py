"""`moestro bench specialisation`: do experts keep to their domains, and what does the balance loss do to that.

On the seeds and branches of `moestro bench upcycling`, per layer, with a figure beside the table.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from moestro.artifacts import Artifact
from moestro.config import DomainSupervision, GlobalBatchLoss, ProfileConfig, RoutingLossConfig, SwitchLoss
from moestro.models.files import read_origins
from moestro_flows.home import Home
from moestro_services.upcycling.arms import Arms
from moestro_services.upcycling.bench import SEEDS, full_scale, on_all_seeds, workshop_here
from moestro_services.upcycling.drawing import draw_layers
from moestro_services.upcycling.rivals import MIXES, RECIPE, SPARSE, recipe_tuned, sparse_tuned
from moestro_services.upcycling.statistics import Interval, ratios

MIN_SHARE = 1.5
MIN_DISTANCE = 1.5
SUPERVISED = "recipe, supervised by domain"
SUPERVISION = (GlobalBatchLoss(), DomainSupervision(coefficient=0.02, final_coefficient=0.02))
MICRO, GLOBAL = "recipe, balanced by micro-batch", "recipe, balanced by global batch"


@dataclass(frozen=True)
class Routing:
    """One model's routing of held-out text, by layer."""

    shares: list[float]
    """Share of a domain's choices that its own expert takes, by that of uniform routing; mean over domains."""
    distances: list[float]
    """Total variation between the domains' distributions over experts, mean over pairs."""

    @property
    def share(self) -> float:
        """Mean over layers; NaN where no expert is a domain's own."""
        return sum(self.shares) / len(self.shares)

    @property
    def distance(self) -> float:
        """Mean over layers."""
        return sum(self.distances) / len(self.distances)


def bench() -> dict[str, Any]:
    """Trains what `moestro bench upcycling` has not trained yet; draws `bench/specialisation.svg` in the home."""
    with workshop_here() as workshop:
        found = on_all_seeds(workshop, full_scale(), SEEDS, models)
    picture = Home.current().path / "bench" / "specialisation.svg"
    draw_layers(
        {name: ([one.shares for one in rows], [one.distances for one in rows]) for name, rows in found.items()}, picture
    )
    return report(found) | {"picture": str(picture)}


def models(arms: Arms) -> dict[str, Callable[[], Routing]]:
    """What is compared, by name."""
    return {
        RECIPE: lambda: _routing(arms, recipe_tuned(arms)),
        SUPERVISED: lambda: _routing(arms, recipe_tuned(arms, losses=SUPERVISION)),
        SPARSE: lambda: _routing(arms, sparse_tuned(arms)),
        MICRO: lambda: _routing(arms, _balanced(arms, MICRO, SwitchLoss(coefficient=0.1))),
        GLOBAL: lambda: _routing(arms, _balanced(arms, GLOBAL, GlobalBatchLoss(coefficient=0.1))),
    }


def _balanced(arms: Arms, what: str, loss: RoutingLossConfig) -> Artifact:
    """The recipe's mixture, tuned on micro-batches of one sequence, hence of one domain."""
    recipe = MIXES[RECIPE]
    model = arms.mix(RECIPE, recipe.branches(arms), **recipe.mix)
    training = arms.training(steps=arms.scale.tune_steps // 2)
    training = training.model_copy(update={"accumulation": arms.scale.batch_size})
    return arms.tune(what, model, training, losses=(loss,))


def _routing(arms: Arms, model: Artifact) -> Routing:
    config = ProfileConfig(sequence_length=arms.scale.sequence_length, max_tokens=arms.scale.held_out_tokens)
    profile = arms.lab.run("profile", config, model=model, tokens=arms.tokens)
    tensors = load_file(profile.path / "routing.safetensors")
    counts = {domain: tensors[f"counts/{domain}"] for domain in arms.tokens}
    return Routing(own_shares(counts, read_origins(profile.path)), distances(counts))


def own_shares(counts: Mapping[str, Tensor], origins: Sequence[Sequence[str]]) -> list[float]:
    """By layer, see `Routing.shares`. `counts` [L, E] by domain; NaN in a layer where no domain has an own expert."""
    layers = []
    for layer, names in enumerate(origins):
        found = [
            float(counts_LE[layer][own].sum() / counts_LE[layer].sum()) * len(names) / int(own.sum())
            for domain, counts_LE in counts.items()
            if (own := torch.tensor([name == domain for name in names])).any()
        ]
        layers.append(sum(found) / len(found) if found else float("nan"))
    return layers


def distances(counts: Mapping[str, Tensor]) -> list[float]:
    """By layer, see `Routing.distances`. `counts` [L, E] by domain."""
    spread = [counts_LE / counts_LE.sum(dim=1, keepdim=True) for counts_LE in counts.values()]
    pairs = torch.stack([(one - other).abs().sum(dim=1) / 2 for one, other in combinations(spread, 2)])
    return [float(value) for value in pairs.mean(dim=0)]


def report(found: Mapping[str, Sequence[Routing]]) -> dict[str, Any]:
    """The table, its bounds and notes."""
    distance = {name: [one.distance for one in rows] for name, rows in found.items()}
    share = Interval.of([one.share for one in found[RECIPE]])
    apart = {name: ratios(distance[name], distance[SPARSE]) for name in (RECIPE, SUPERVISED)}
    globally = Interval.of([a - b for a, b in zip(distance[GLOBAL], distance[MICRO], strict=True)])
    return {
        "title": f"Specialisation on held-out text, {len(found[RECIPE])} random seeds",
        "columns": ["model", "own expert's share by uniform", "distance between domains", "by layer"],
        "rows": [
            [
                name,
                str(Interval.of([one.share for one in rows])),
                str(Interval.of(distance[name])),
                "  ".join(
                    f"{sum(layer) / len(layer):.2f}" for layer in zip(*(one.distances for one in rows), strict=True)
                ),
            ]
            for name, rows in found.items()
        ],
        "bounds": [
            _bound("recipe, own expert's share by uniform", share, MIN_SHARE),
            _bound("distance between domains, recipe's by sparse upcycling's", apart[RECIPE], MIN_DISTANCE),
            _bound("distance between domains, global batch less micro-batch", globally, 0.0),
        ],
        "notes": [
            "Distance: total variation between two domains' distributions over a layer's experts, mean over pairs.",
            f"Supervised by domain the recipe is {apart[SUPERVISED]} times as far apart as sparse upcycling.",
            f"Supervision: domain_supervision of {SUPERVISION[1].coefficient} beside the balance of the global batch.",
            "The last two models see micro-batches of one domain each, with the same coefficient, 0.1.",
            "± is half a 95% interval over random seeds (Student's t).",
        ],
    }


def _bound(what: str, value: Interval, limit: float) -> dict[str, Any]:
    return {"what": f"{what} ({value})", "value": value.mean, "limit": f">= {limit}", "ok": value.mean >= limit}
