"""Figures of merit of a routing, from how often each domain's tokens chose each expert.

L sparse layers, E experts.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor


def dead_experts(counts: Mapping[str, Tensor]) -> int:
    """Experts, over all layers, that no token of any domain chose. `counts` [L, E] per domain."""
    return int((_pooled(counts) == 0).sum())


def unused_experts(counts_LE: Tensor, below: float) -> Tensor:
    """Which experts [L, E] are dead: chosen never, or with less than `below` times an even share of their layer's
    choices. There is no standard for `below`; 0.01 is what the deploy stage takes."""
    even_L1 = counts_LE.double().mean(dim=1, keepdim=True)
    return (counts_LE == 0) | (counts_LE < below * even_L1)


def load_variation(counts_LE: Tensor) -> float:
    """Coefficient of variation of a layer's loads, standard deviation over mean; the worst layer.

    The experts are all there are, not a sample, so the deviation is the population's. 0 is perfect balance,
    sqrt(E / K - 1) the most possible. NaN where a layer has no tokens.
    """
    load_LE = counts_LE.double()
    return float((load_LE.std(dim=1, correction=0) / load_LE.mean(dim=1)).max())


def max_violation(counts: Mapping[str, Tensor]) -> float:
    """Largest load of an expert over the mean load of its layer, minus 1; the worst layer (MaxVio, arXiv 2408.15664).

    Domains are pooled token by token. 0 is perfect balance, E / K - 1 the most possible.
    """
    load_LE = _pooled(counts).double()
    return float((load_LE.max(dim=1).values / load_LE.mean(dim=1) - 1).max())


def specialisation(counts: Mapping[str, Tensor], origins: Sequence[Sequence[str]]) -> dict[str, float | None]:
    """Per domain, the share of its slots that its own experts take over the share uniform routing would give them.

    Mean over the layers in which the domain has an expert of its own; None if it has one in no layer.
    """
    return {domain: _own_share(counts_LE, origins, domain) for domain, counts_LE in counts.items()}


def _own_share(counts_LE: Tensor, origins: Sequence[Sequence[str]], domain: str) -> float | None:
    ratios = []
    for counts_E, names in zip(counts_LE, origins, strict=True):
        own = [expert for expert, name in enumerate(names) if name == domain]
        if own:
            share = float(counts_E[own].sum()) / float(counts_E.sum())
            ratios.append(share * len(names) / len(own))
    return sum(ratios) / len(ratios) if ratios else None


def _pooled(counts: Mapping[str, Tensor]) -> Tensor:
    return sum(counts.values(), start=next(iter(counts.values())).new_zeros(()))
