"""Shares of a mixture: exact over time, by rule, and a function of the step alone."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from moestro.data.packed import Mixture, PackedTokens
from moestro.errors import InputError

S = 4
LENGTHS = {"a": 101, "b": 61, "c": 33}


def mixture(shares: dict[str, float | Fraction] | None, names: str = "abc") -> Mixture:
    # Distinct ids everywhere, so that a window says where it comes from.
    domains = {name: PackedTokens.of(np.arange(LENGTHS[name]) + 1000 * "abc".index(name)) for name in names}
    return Mixture(domains, S, seed=0, shares=shares)


def chosen(found: Mixture, sequences: int) -> list[int]:
    return found.batch(0, sequences).domains_B.tolist()


@pytest.mark.parametrize(
    "shares",
    [
        {"a": 0.9, "b": 0.05, "c": 0.05},
        {"a": 0.2, "b": 0.3, "c": 0.5},
        {"a": Fraction(1, 7), "b": Fraction(2, 7), "c": Fraction(4, 7)},
        {"a": 8.0, "b": 1.0, "c": 1.0},
        {"a": 0.015625, "b": 0.75, "c": 0.234375},
    ],
)
def test_shares_are_right_at_any_moment(shares: dict[str, float | Fraction]) -> None:
    order, whole = chosen(mixture(shares), 2000), float(sum(shares.values()))
    counts = [0, 0, 0]
    for sequences, domain in enumerate(order, 1):
        counts[domain] += 1
        for position, share in enumerate(shares.values()):
            assert abs(counts[position] - sequences * float(share) / whole) < 1 + position
    assert counts == pytest.approx([2000 * float(share) / whole for share in shares.values()], abs=1)


def test_general_text_comes_evenly_spread() -> None:
    order = chosen(mixture({"a": 0.8, "b": 0.2}, "ab"), 25)
    assert order == [0, 0, 0, 0, 1] * 5


def test_without_shares_and_with_equal_ones_domains_take_turns() -> None:
    plain, equal = mixture(None), mixture({"a": 0.1, "b": 0.1, "c": 0.1})
    assert chosen(plain, 12) == [0, 1, 2] * 4
    for step in (0, 7, 100_000):
        assert torch.equal(plain.batch(step, 5).tokens_BS, equal.batch(step, 5).tokens_BS)


def test_equal_shares_give_the_windows_of_each_domains_own_count() -> None:
    """Sequence n is window n // 3 of domain n % 3, as it is without any rule of shares."""
    batch = mixture(None).batch(3, 8)
    alone = {name: mixture(None, name).batch(0, 32).tokens_BS for name in "abc"}
    for row, sequence in enumerate(range(24, 32)):
        turn, domain = divmod(sequence, 3)
        assert torch.equal(batch.tokens_BS[row], alone["abc"[domain]][turn])


def test_a_batch_is_a_function_of_the_step_alone() -> None:
    shares: dict[str, float | Fraction] = {"a": 0.7, "b": 0.2, "c": 0.1}
    whole = mixture(shares).batch(0, 60)
    for step in (9, 3, 0):
        part = mixture(shares).batch(step, 6)
        assert torch.equal(part.tokens_BS, whole.tokens_BS[6 * step : 6 * step + 6])
        assert torch.equal(part.domains_B, whole.domains_B[6 * step : 6 * step + 6])


def test_every_window_comes_once_an_epoch_whatever_the_share() -> None:
    found = mixture({"a": 0.3, "b": 0.7}, "ab")
    batch = found.batch(0, 50)  # of b 35 windows: two epochs of 15, and 5
    starts = batch.tokens_BS[batch.domains_B == 1][:, 0].tolist()
    assert sorted(starts[:15]) == sorted(starts[15:30]) == [1000 + S * window for window in range(15)]
    assert starts[:15] != starts[15:30]


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"a": 1.0, "b": 0.0}, "share of b is 0.0, which is not above 0"),
        ({"a": 1.0, "b": -0.5}, "share of b is -0.5"),
        ({"a": float("nan"), "b": 1.0}, "share of a is nan"),
        ({"a": 1.0}, r"shares are of \['a'\], the domains are \['a', 'b'\]"),
        ({"a": 1.0, "b": 1.0, "x": 1.0}, r"shares are of \['a', 'b', 'x'\]"),
    ],
)
def test_shares_that_mean_nothing_are_refused(shares: dict[str, float | Fraction], message: str) -> None:
    with pytest.raises(InputError, match=message):
        mixture(shares, "ab")
