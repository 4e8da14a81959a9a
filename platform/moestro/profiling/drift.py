"""How far the routing of some traffic is from the one that was profiled, where nobody knows the traffic's domains.

A profile tells for each domain d how the choices of its tokens spread over the experts e of a layer l, p[d, l, e].
Traffic that mixes the profiled domains in shares w spreads them like q[w] = sum over d of w[d] p[d]. A chat model
that is suddenly asked for code routes differently without anything being wrong with it, so traffic with the
counts n[l, e] is compared with the mixture nearest to it, in the sense of maximum likelihood:

    w = argmax over the simplex of  sum over l, e of n[l, e] log q[w][l, e]
    drift[l] = JSD(n[l] / |n[l]|, q[w][l]) = H((p + q) / 2) - H(p) / 2 - H(q) / 2   in bits

All layers share one w: a token has one domain, whatever the layer. The Jensen-Shannon divergence is 0 for equal
distributions and 1 bit for such as share no expert. What mixtures of the profiled domains explain is no drift; a
domain that was never profiled is, and so is a router that changed.

Finite samples differ from what they are drawn from: S independent choices in a layer of E experts show a drift of
about (E - 1) / (8 S ln 2) bits where there is none. Tokens of one text are not independent, which makes it more.

D domains, L layers, E experts, C cells (l, e).
"""

from dataclasses import dataclass

import numpy as np

from moestro.profiling.loads import shares

TOLERANCE = 1e-6
MAX_STEPS = 300


@dataclass(frozen=True)
class Mixture:
    """Shares of domains."""

    weights_D: np.ndarray
    """Not negative, summing to 1."""
    gap: float
    """Nats per choice that the likelihood of the best mixture is above this one's, at most."""


@dataclass(frozen=True)
class Drift:
    """What differs between traffic and the profiled mixture nearest to it."""

    bits_L: np.ndarray
    """Jensen-Shannon divergence of each layer in bits, 0 to 1."""
    weights_D: np.ndarray
    """Shares of the domains in the nearest mixture."""


def drift(counts_LE: np.ndarray, domains_DLE: np.ndarray) -> Drift:
    """The drift of traffic with `counts` from the counts per domain of a profile.

    Raises `ValueError` if shapes do not fit, or a layer of the traffic or of a domain has no count.
    """
    domains_DLE = _distributions(counts_LE, domains_DLE)
    mixture = _nearest(counts_LE, domains_DLE)
    mixed_LE = np.tensordot(mixture.weights_D, domains_DLE, axes=1)
    return Drift(jensen_shannon_bits(shares(counts_LE), mixed_LE), mixture.weights_D)


def nearest_mixture(counts_LE: np.ndarray, domains_DLE: np.ndarray) -> Mixture:
    """The mixture of a profile's domains under which `counts` are likeliest; raises as `drift` does.

    Found by expectation maximisation from equal shares: w[d] <- w[d] g[d], with g[d] the mean of p[d] / q[w] over the
    traffic's choices, sped up by extrapolation (SQUAREM, Varadhan and Roland 2008). Likelihood is concave in w, and by
    Jensen's inequality no mixture is more than log max g above w: that is the gap, and it ends the search. Choices of
    experts that no domain ever chose tell nothing of the domains and are left out here (they are in the drift).
    """
    return _nearest(counts_LE, _distributions(counts_LE, domains_DLE))


def jensen_shannon_bits(p_LE: np.ndarray, q_LE: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence of the distributions in each row, in bits, 0 to 1 [L]."""
    middle_LE = (p_LE + q_LE) / 2
    return np.asarray(np.clip((_relative_bits(p_LE, middle_LE) + _relative_bits(q_LE, middle_LE)) / 2, 0, 1))


def _relative_bits(p_LE: np.ndarray, q_LE: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergence of each row of p from q, in bits; q is positive where p is."""
    ratio_LE = np.divide(p_LE, q_LE, out=np.ones_like(p_LE), where=p_LE > 0)
    return np.asarray((p_LE * np.log2(ratio_LE)).sum(axis=1))


def _distributions(counts_LE: np.ndarray, domains_DLE: np.ndarray) -> np.ndarray:
    if domains_DLE.ndim != 3 or not len(domains_DLE) or domains_DLE.shape[1:] != counts_LE.shape:
        raise ValueError(f"A profile of shape {domains_DLE.shape} does not fit traffic of shape {counts_LE.shape}.")
    return np.stack([shares(domain_LE) for domain_LE in domains_DLE])


def _nearest(counts_LE: np.ndarray, domains_DLE: np.ndarray) -> Mixture:
    domains = len(domains_DLE)
    weights_D = np.full(domains, 1 / domains)
    told_LE = (domains_DLE > 0).any(axis=0) & (counts_LE > 0)
    if not told_LE.any():
        return Mixture(weights_D, 0.0)
    p_DC = domains_DLE[:, told_LE]
    n_C = counts_LE[told_LE] / counts_LE[told_LE].sum(dtype=np.float64)
    for _ in range(MAX_STEPS):
        gain_D = _gain(weights_D, n_C, p_DC)
        if np.log(gain_D.max()) < TOLERANCE:
            break
        weights_D = _farther(weights_D, weights_D * gain_D, n_C, p_DC)
    return Mixture(weights_D, max(float(np.log(_gain(weights_D, n_C, p_DC).max())), 0.0))


def _gain(weights_D: np.ndarray, n_C: np.ndarray, p_DC: np.ndarray) -> np.ndarray:
    return np.asarray(p_DC @ (n_C / (weights_D @ p_DC)))


def _farther(before_D: np.ndarray, after_D: np.ndarray, n_C: np.ndarray, p_DC: np.ndarray) -> np.ndarray:
    """Two steps after `before`, and on along the line of both steps (SQUAREM) where that is likelier."""
    last_D = after_D * _gain(after_D, n_C, p_DC)
    step_D, bend_D = after_D - before_D, last_D - 2 * after_D + before_D
    bend = float(np.linalg.norm(bend_D))
    if bend == 0:
        return np.asarray(last_D / last_D.sum())
    length = float(np.linalg.norm(step_D)) / bend
    leap_D = np.maximum(before_D + 2 * length * step_D + length**2 * bend_D, last_D / 10)
    leap_D /= leap_D.sum()
    gained = n_C @ np.log((leap_D @ p_DC) / (last_D @ p_DC))
    return np.asarray(leap_D if gained > 0 else last_D / last_D.sum())
