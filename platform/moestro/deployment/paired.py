"""Telling a drop of accuracy from noise when two models answered the same problems."""

import math

CONFIDENCE = 0.95
Z = 1.6448536269514722
"""Standard normal quantile of `CONFIDENCE`, one-sided: only a drop is of interest."""


def smallest_drop(champion: str, candidate: str) -> float:
    """Lower 95% limit of how much less accurate `candidate` is than `champion`.

    Both are strings of "1" (right) and "0", one for each problem, in the same order. The interval is Wald's for
    matched pairs with half an observation added to each of the four cells ("Wald+2": Agresti and Min, Simple improved
    confidence intervals for comparing matched proportions, Statistics in Medicine 24, 2005, 729-740). With b problems
    that only the champion solved, c that only the candidate did, and n in all,

        d = (b - c) / (n + 2),   s = sqrt(b + c + 1 - (b - c)^2 / (n + 2)) / (n + 2),   limit = d - z s

    Problems both solved, or neither did, tell nothing of the difference, which is why pairs need fewer problems than
    two independent binomial samples. Raises `ValueError` if the strings differ in length or are empty.
    """
    if not champion or len(champion) != len(candidate):
        raise ValueError(f"{len(champion)} and {len(candidate)} answers cannot be paired")
    pairs = list(zip(champion, candidate, strict=True))
    lost, won, number = pairs.count(("1", "0")), pairs.count(("0", "1")), len(pairs) + 2
    spread = math.sqrt(lost + won + 1 - (lost - won) ** 2 / number) / number
    return max(-1.0, (lost - won) / number - Z * spread)
