"""The parity gate's figures and its verdict."""

import numpy as np
import pytest

from moestro.config import ParityGate
from moestro.deployment.gates.parity import compare, refusals
from moestro.inference.engine import Scored

ROUTES = np.array([[[0, 1], [2, 3]], [[1, 2], [0, 3]]], np.uint8)
EXPECTED = [Scored(np.array([-1.0, -2.0], np.float32), ROUTES), Scored(np.array([-3.0], np.float32), ROUTES)]


def served(shift: float, routes: np.ndarray | None) -> list[Scored]:
    return [Scored(np.array([-1.0, -2.0 + shift], np.float32), routes), Scored(np.array([-3.0], np.float32), routes)]


def test_the_order_of_experts_in_a_row_does_not_matter():
    parity = compare(served(0.0, ROUTES[..., ::-1]), EXPECTED)
    assert (parity.tokens, parity.max_logprob_difference, parity.routing_agreement) == (3, 0.0, 1.0)


def test_differences_are_counted_per_token_and_layer():
    other = ROUTES.copy()
    other[0, 1] = [0, 1]
    parity = compare(served(-0.3, other), EXPECTED)
    assert parity.max_logprob_difference == pytest.approx(0.3)
    assert parity.mean_logprob_difference == pytest.approx(0.1)
    assert parity.routing_agreement == 0.75


def test_a_dense_model_has_no_routing_figure():
    parity = compare(served(0.0, None), EXPECTED)
    assert parity.figures()["routing_agreement"] is None
    assert refusals(parity, ParityGate()) == []


def test_a_refusal_names_figures_and_thresholds():
    other = ROUTES.copy()
    other[0, 1] = [0, 1]
    logprobs, routes = refusals(compare(served(0.3, other), EXPECTED), ParityGate())
    assert "differ by up to 0.3 nats (mean 0.1; at most 0.001 is allowed)" in logprobs
    assert routes == "only 75.00% of routings agree with transformers' (at least 99.00% must)"


def test_a_difference_that_is_no_number_is_refused():
    parity = compare(served(float("nan"), ROUTES), EXPECTED)
    assert "up to nan nats" in refusals(parity, ParityGate())[0]
    assert parity.figures()["max_logprob_difference"] is None
