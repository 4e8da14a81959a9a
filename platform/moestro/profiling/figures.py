"""Figures of merit of a routing, from how often each domain's tokens chose each expert.

L sparse layers, E experts.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor


def dead_experts(counts: Mapping[str, Tensor]) -> int:
    """Experts, over all layers, that no token of any domain chose. `counts` [L, E] per domain."""
    return int((_pooled(counts) == 0).sum())


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
