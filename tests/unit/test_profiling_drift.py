"""Load figures and drift: bounds, invariances, and that a mix of known domains is no drift."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moestro.profiling.drift import TOLERANCE, drift, jensen_shannon_bits, nearest_mixture
from moestro.profiling.loads import dead, entropy_ratio, load_variation, max_violation, shares

SIZES = st.tuples(st.integers(1, 3), st.integers(2, 8))


@st.composite
def counted(draw: st.DrawFn, domains: int = 0) -> np.ndarray:
    """Counts [L, E], or [D, L, E]; every layer has one."""
    layers, experts = draw(SIZES)
    shape = (domains, layers, experts) if domains else (layers, experts)
    counts = draw(arrays(np.int64, shape, elements=st.integers(0, 500)))
    counts[..., 0] += 1
    return counts


@st.composite
def profiled(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Traffic [L, E] and a profile [D, L, E] of the same model."""
    profile_DLE = draw(counted(domains=draw(st.integers(1, 4))))
    traffic_LE = draw(arrays(np.int64, profile_DLE.shape[1:], elements=st.integers(0, 500)))
    traffic_LE[:, -1] += 1
    return traffic_LE, profile_DLE


def likelihood(counts_LE: np.ndarray, profile_DLE: np.ndarray, weights_D: np.ndarray) -> float:
    """Mean log-likelihood in nats of the choices that some domain could have made."""
    p_DLE = np.stack([shares(domain) for domain in profile_DLE])
    mixed_LE = np.tensordot(weights_D, p_DLE, axes=1)
    told_LE = (p_DLE > 0).any(axis=0) & (counts_LE > 0)
    with np.errstate(divide="ignore"):
        return float((counts_LE[told_LE] * np.log(mixed_LE[told_LE])).sum() / max(counts_LE[told_LE].sum(), 1))


@given(counted())
def test_figures_lie_in_their_bounds_and_do_not_see_scale_or_order(counts_LE: np.ndarray) -> None:
    experts = counts_LE.shape[1]
    bounds = {load_variation: np.sqrt(experts - 1), max_violation: experts - 1, entropy_ratio: 1}
    for figure, most in bounds.items():
        values_L = figure(counts_LE)
        assert (values_L >= 0).all()
        assert (values_L <= most + 1e-9).all()
        np.testing.assert_allclose(figure(counts_LE * 7), values_L, atol=1e-12)
        np.testing.assert_allclose(figure(counts_LE[:, ::-1]), values_L, atol=1e-12)


def test_figures_of_balance_and_of_one_expert() -> None:
    counts_LE = np.array([[5, 5, 5, 5], [20, 0, 0, 0]])
    np.testing.assert_allclose(load_variation(counts_LE), [0, np.sqrt(3)])
    np.testing.assert_allclose(max_violation(counts_LE), [0, 3])
    np.testing.assert_allclose(entropy_ratio(counts_LE), [1, 0])
    assert dead(counts_LE, share=0.01).tolist() == [[False] * 4, [False, True, True, True]]
    assert entropy_ratio(np.array([[3]])).tolist() == [1]


def test_dead_is_a_share_of_the_uniform_load() -> None:
    counts_LE = np.array([[996, 996, 996, 12]])  # the last one has 0.016 of a quarter
    assert dead(counts_LE, share=0.02).tolist() == [[False, False, False, True]]
    assert not dead(counts_LE, share=0.01).any()


def test_a_layer_without_a_count_is_refused() -> None:
    with pytest.raises(ValueError, match="without a single choice"):
        shares(np.array([[1, 0], [0, 0]]))


@given(counted(), st.integers(0, 2**32 - 1))
def test_divergence_is_symmetric_bounded_and_nothing_for_equals(counts_LE: np.ndarray, seed: int) -> None:
    p_LE = shares(counts_LE)
    q_LE = np.random.default_rng(seed).dirichlet(np.ones(p_LE.shape[1]), len(p_LE))
    bits_L = jensen_shannon_bits(p_LE, q_LE)
    np.testing.assert_allclose(bits_L, jensen_shannon_bits(q_LE, p_LE), atol=1e-12)
    assert ((bits_L >= 0) & (bits_L <= 1)).all()
    np.testing.assert_allclose(jensen_shannon_bits(p_LE, p_LE), 0, atol=1e-12)


def test_divergence_of_distributions_that_share_no_expert_is_one_bit() -> None:
    assert jensen_shannon_bits(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])).tolist() == [1.0]


def test_divergence_agrees_with_scipys() -> None:
    from scipy.spatial.distance import jensenshannon

    p_LE, q_LE = (np.random.default_rng(seed).dirichlet(np.ones(16), 5) for seed in (0, 1))
    expected = [jensenshannon(p, q, base=2) ** 2 for p, q in zip(p_LE, q_LE, strict=True)]
    np.testing.assert_allclose(jensen_shannon_bits(p_LE, q_LE), expected, atol=1e-12)


@settings(deadline=None)
@given(counted(domains=3), st.lists(st.integers(0, 5), min_size=3, max_size=3).filter(any))
def test_any_mix_of_the_profiled_domains_is_no_drift(profile_DLE: np.ndarray, parts: list[int]) -> None:
    # Every domain as often profiled as the others, so that counts add up as shares do.
    even_DLE = np.stack([shares(domain) for domain in profile_DLE])
    traffic_LE = np.tensordot(np.array(parts) / sum(parts), even_DLE, axes=1) * 10_000
    assert drift(traffic_LE, profile_DLE).bits_L.max() < 1e-4


@given(profiled(), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_no_mixture_is_likelier_than_the_nearest_by_more_than_its_gap(
    case: tuple[np.ndarray, np.ndarray], seed: int
) -> None:
    traffic_LE, profile_DLE = case
    found = nearest_mixture(traffic_LE, profile_DLE)
    assert found.weights_D.min() >= 0
    assert found.weights_D.sum() == pytest.approx(1)
    assert found.gap < 1e-2  # most are below TOLERANCE; a flat likelihood may end at MAX_STEPS
    best = likelihood(traffic_LE, profile_DLE, found.weights_D)
    corners = np.eye(len(profile_DLE))
    for weights_D in (*corners, *np.random.default_rng(seed).dirichlet(np.ones(len(profile_DLE)), 20)):
        assert likelihood(traffic_LE, profile_DLE, weights_D) <= best + found.gap + 1e-9


@given(profiled())
@settings(deadline=None)
def test_drift_is_bounded_and_sees_neither_scale_nor_the_order_of_experts(case: tuple[np.ndarray, np.ndarray]) -> None:
    traffic_LE, profile_DLE = case
    bits_L = drift(traffic_LE, profile_DLE).bits_L
    assert ((bits_L >= 0) & (bits_L <= 1)).all()
    np.testing.assert_allclose(drift(traffic_LE * 3, profile_DLE * 5).bits_L, bits_L, atol=1e-6)
    turned = drift(traffic_LE[:, ::-1], profile_DLE[:, :, ::-1]).bits_L
    np.testing.assert_allclose(turned, bits_L, atol=1e-6)


def test_the_domains_of_a_sample_are_found_and_a_changed_router_is_seen() -> None:
    rng = np.random.default_rng(3)
    profile_DLE = rng.dirichlet(np.full(16, 0.3), (3, 4))
    wanted_D = np.array([0.7, 0.0, 0.3])
    mixed_LE = np.tensordot(wanted_D, profile_DLE, axes=1)
    traffic_LE = np.stack([rng.multinomial(40_000, layer) for layer in mixed_LE])
    found = drift(traffic_LE, profile_DLE)
    np.testing.assert_allclose(found.weights_D, wanted_D, atol=0.02)
    assert found.bits_L.max() < 10 * 15 / (8 * 40_000 * np.log(2))
    assert nearest_mixture(traffic_LE, profile_DLE).gap < TOLERANCE
    changed_LE = traffic_LE.copy()
    changed_LE[2] = changed_LE[2, ::-1]
    bits_L = drift(changed_LE, profile_DLE).bits_L
    assert bits_L.argmax() == 2
    assert bits_L[2] > 0.1


def test_experts_that_no_domain_chose_count_as_drift() -> None:
    profile_DLE = np.array([[[10, 0, 0]], [[0, 10, 0]]])
    assert drift(np.array([[5, 5, 0]]), profile_DLE).bits_L == pytest.approx(0, abs=1e-6)
    assert drift(np.array([[5, 5, 10]]), profile_DLE).bits_L > 0.2
    assert drift(np.array([[0, 0, 10]]), profile_DLE).bits_L == pytest.approx(1)


def test_a_profile_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        drift(np.ones((2, 4)), np.ones((3, 2, 5)))
    with pytest.raises(ValueError, match="does not fit"):
        drift(np.ones((2, 4)), np.ones((0, 2, 4)))


def test_the_maths_needs_no_torch() -> None:
    script = "import sys, moestro.profiling.drift; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
