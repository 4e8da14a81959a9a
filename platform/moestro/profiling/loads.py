"""How evenly the experts of each layer are used, from how many tokens chose each.

L layers, E experts. `counts` is always [L, E], and every layer has at least one; a layer without raises `ValueError`.
"""

import numpy as np


def shares(counts_LE: np.ndarray) -> np.ndarray:
    """Part of a layer's choices that each expert got [L, E]; each layer sums to 1."""
    total_L1 = counts_LE.sum(axis=1, keepdims=True, dtype=np.float64)
    if not (total_L1 > 0).all():
        raise ValueError("A layer without a single choice has no shares.")
    return np.asarray(counts_LE / total_L1)


def load_variation(counts_LE: np.ndarray) -> np.ndarray:
    """Standard deviation of the experts' loads over their mean [L]; 0 is perfect balance, sqrt(E - 1) one expert."""
    share_LE = shares(counts_LE)
    return np.asarray(share_LE.std(axis=1) / share_LE.mean(axis=1))


def max_violation(counts_LE: np.ndarray) -> np.ndarray:
    """Largest load over the mean load, minus 1 [L] (MaxVio, arXiv 2408.15664); 0 is perfect balance."""
    share_LE = shares(counts_LE)
    return np.asarray(share_LE.max(axis=1) * share_LE.shape[1] - 1)


def entropy_ratio(counts_LE: np.ndarray) -> np.ndarray:
    """Entropy of the experts' shares over that of uniform ones, log E [L]: 1 is balance, 0 one expert.

    A layer of a single expert has 1.
    """
    share_LE = shares(counts_LE)
    experts = share_LE.shape[1]
    if experts == 1:
        return np.ones(len(share_LE))
    logarithm_LE = np.log(share_LE, out=np.zeros_like(share_LE), where=share_LE > 0)
    return np.asarray(np.clip(-(share_LE * logarithm_LE).sum(axis=1) / np.log(experts), 0, 1))


def dead(counts_LE: np.ndarray, *, share: float) -> np.ndarray:
    """Which experts got less than `share` of the load that uniform routing would give them, 1/E [L, E] bool."""
    share_LE = shares(counts_LE)
    return np.asarray(share_LE * share_LE.shape[1] < share)
