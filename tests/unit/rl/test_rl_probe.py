"""What is taken for rounding between rollout engine and trainer, and what is not."""

import math

import pytest

from moestro.config import RlConfig, TaskConfig
from moestro.errors import TrainingError
from moestro.rl.probe import Agreement, require_agreement

TASK = TaskConfig(name="gcd")


def check(dtype, largest, k3):
    config = RlConfig(task=TASK, rollout_dtype=dtype)
    require_agreement(Agreement(largest, k3), config, step=3, what="after the weight refresh")


def test_in_float32_one_token_off_is_enough():
    check("float32", 1e-3, 1e-8)
    with pytest.raises(TrainingError, match=r"rl step 3: after the weight refresh, .* up to 0.002 nats .*0.001 nats"):
        check("float32", 2e-3, 1e-8)


def test_in_bfloat16_one_token_whose_route_changed_is_rounding_and_many_are_not():
    check("bfloat16", 0.7, 5e-4)
    with pytest.raises(TrainingError, match=r"up to 0\.4 nats in a token's log-probability, k3 0\.03 nats"):
        check("bfloat16", 0.4, 0.03)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nan_is_not_rounding(dtype):
    with pytest.raises(TrainingError, match="nan"):
        check(dtype, math.nan, math.nan)
