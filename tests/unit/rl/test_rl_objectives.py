"""Objectives, advantages, corrections and penalties against closed forms and plain loops."""

import math

import pytest
import torch

from moestro.config import Cispo, Correction, Dapo, DrGrpo, Grpo, Gspo
from moestro.rl.advantages import EPS, advantages, group_std
from moestro.rl.correction import importance_weights
from moestro.rl.divergence import extreme_fraction, k3_divergence, penalty
from moestro.rl.objectives import OBJECTIVES, Tokens

MAX_TOKENS = 9
CONFIGS = [
    Grpo(),
    Grpo(clip=0.1, clip_high=0.4),
    DrGrpo(),
    Dapo(),
    Gspo(clip=0.05, clip_high=0.1),
    Cispo(max_ratio=1.3),
]


def batch() -> Tokens:
    generator = torch.Generator().manual_seed(0)
    new = torch.randn(5, 7, generator=generator, dtype=torch.float64).requires_grad_()
    old = (new + 0.4 * torch.randn(5, 7, generator=generator, dtype=torch.float64)).detach()
    scores = torch.randn(5, generator=generator, dtype=torch.float64)
    mask = torch.rand(5, 7, generator=generator) < 0.6
    return Tokens(new, old, scores, mask)


def loss(config, tokens):
    objective = OBJECTIVES[config.type]
    found = objective.surrogate(config, tokens)
    return (found.loss_BS * objective.weights(tokens.mask_BS, MAX_TOKENS)).sum(), found


def plain(config, tokens):
    """The same in scalars, sequence by sequence."""
    total = torch.zeros((), dtype=torch.float64)
    count, sequences = int(tokens.mask_BS.sum()), len(tokens.mask_BS)
    for b in range(sequences):
        positions = [s for s in range(tokens.mask_BS.shape[1]) if tokens.mask_BS[b, s]]
        logs = [tokens.logprobs_BS[b, s] - tokens.old_logprobs_BS[b, s] for s in positions]
        advantage = tokens.advantages_B[b]
        for s, log in zip(positions, logs, strict=True):
            if config.type == "cispo":
                weight = min(math.exp(float(log.detach())), config.max_ratio)
                term = -weight * advantage * tokens.logprobs_BS[b, s]
            else:
                ratio = torch.exp(sum(logs) / len(logs) if config.type == "gspo" else log)
                high = config.clip if config.clip_high is None else config.clip_high
                bound = min(max(float(ratio.detach()), 1 - config.clip), 1 + high) * advantage
                free = ratio * advantage
                term = -(free if free <= bound else bound)
            share = {
                "grpo": 1 / (len(positions) * sequences),
                "gspo": 1 / (len(positions) * sequences),
                "dr_grpo": 1 / (MAX_TOKENS * sequences),
                "dapo": 1 / count,
                "cispo": 1 / count,
            }[config.type]
            total = total + share * term
    return total


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.type}")
def test_loss_and_gradients_are_those_of_a_plain_loop(config):
    tokens = batch()
    found, surrogate = loss(config, tokens)
    (gradient,) = torch.autograd.grad(found, tokens.logprobs_BS)
    expected = plain(config, tokens)
    (expected_gradient,) = torch.autograd.grad(expected, tokens.logprobs_BS)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    assert not gradient[~tokens.mask_BS].any()
    assert (surrogate.low_BS | surrogate.high_BS).any()
    if config.type != "cispo":
        held = (surrogate.low_BS | surrogate.high_BS) & tokens.mask_BS
        assert held.any()
        assert not gradient[held].any()


def one_token(ratio, advantage, config):
    new = torch.tensor([[math.log(ratio)]], requires_grad=True)
    tokens = Tokens(new, torch.zeros(1, 1), torch.tensor([advantage]), torch.tensor([[True]]))
    found, surrogate = loss(config, tokens)
    (gradient,) = torch.autograd.grad(found, new)
    return float(gradient), bool(surrogate.low_BS), bool(surrogate.high_BS)


@pytest.mark.parametrize(
    ("ratio", "advantage", "moves", "low", "high"),
    [
        (1.5, 1.0, False, False, True),
        (1.5, -1.0, True, False, False),
        (0.5, -1.0, False, True, False),
        (0.5, 1.0, True, False, False),
        (1.25, 1.0, True, False, False),
    ],
)
def test_what_is_clipped_has_no_gradient(ratio, advantage, moves, low, high):
    gradient, is_low, is_high = one_token(ratio, advantage, Dapo(clip=0.2, clip_high=0.28))
    assert (gradient != 0, is_low, is_high) == (moves, low, high)


def test_cispo_teaches_where_others_are_clipped():
    gradient, _, high = one_token(8.0, 1.0, Cispo(max_ratio=5.0))
    assert high
    assert gradient == pytest.approx(-5.0)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.type}")
def test_padding_far_off_does_not_poison_the_gradient(config):
    new = torch.tensor([[0.0, 500.0]], requires_grad=True)
    tokens = Tokens(new, torch.zeros(1, 2), torch.tensor([1.0]), torch.tensor([[True, False]]))
    found, _ = loss(config, tokens)
    (gradient,) = torch.autograd.grad(found, new)
    assert gradient[0, 0] < 0
    assert gradient[0, 1] == 0


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.type}")
@pytest.mark.parametrize("log_ratio", [200.0, -200.0])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_a_ratio_beyond_all_bounds_poisons_nothing(config, log_ratio, advantage):
    new = torch.tensor([[log_ratio, 0.0]], requires_grad=True)
    tokens = Tokens(new, torch.zeros(1, 2), torch.tensor([advantage]), torch.tensor([[True, True]]))
    found, _ = loss(config, tokens)
    (gradient,) = torch.autograd.grad(found, new)
    assert found.isfinite()
    assert gradient.isfinite().all()


def test_the_k3_of_a_token_that_the_policy_no_longer_gives_is_finite():
    policy = torch.tensor([-200.0, 0.0], requires_grad=True)
    found = penalty(policy, torch.tensor([-1.0, -200.0]), "k3")
    (gradient,) = torch.autograd.grad(found.sum(), policy)
    assert found.isfinite().all()
    assert not gradient.any()


def test_advantages_of_one_success_among_four():
    found = advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5]]), "group")
    std = 0.5  # sample standard deviation of (1, 0, 0, 0)
    torch.testing.assert_close(found[0], torch.tensor([0.75, -0.25, -0.25, -0.25]) / (std + EPS))
    assert torch.equal(found[1], torch.zeros(4))


def test_scales_of_advantages():
    rewards = torch.tensor([[1.0, 0.0], [3.0, 1.0]])
    assert advantages(rewards, "none").tolist() == [[0.5, -0.5], [1.0, -1.0]]
    batch_std = float(rewards.std())
    torch.testing.assert_close(advantages(rewards, "batch"), advantages(rewards, "none") / (batch_std + EPS))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_what_was_not_judged_has_no_advantage_and_does_not_count(scale):
    nan = math.nan
    found = advantages(torch.tensor([[1.0, 0.0, nan], [nan, nan, nan], [nan, 2.0, nan]]), scale)
    alone = advantages(torch.tensor([[1.0, 0.0]]), "group" if scale == "group" else "none")
    if scale != "batch":
        torch.testing.assert_close(found[0, :2], alone[0])
    assert found[0, 2] == 0
    assert not found[1:].any()
    assert group_std(torch.tensor([[1.0, 0.0, nan], [nan, nan, 3.0]])).tolist() == pytest.approx([math.sqrt(0.5), 0])


def test_importance_weights_are_truncated_or_masked():
    old, engine = torch.log(torch.tensor([[4.0, 1.0, 0.2]])), torch.zeros(1, 3)
    mask = torch.tensor([[True, True, True]])
    assert importance_weights(Correction(high=2.0), old, engine, mask).tolist() == [
        [pytest.approx(2.0), pytest.approx(1.0), pytest.approx(0.2)]
    ]
    masked = importance_weights(Correction(type="mask", high=5.0, low=0.5), old, engine, mask)
    assert masked.tolist() == [[pytest.approx(4.0), pytest.approx(1.0), 0.0]]
    whole = importance_weights(Correction(level="sequence", high=10.0), old, engine, mask)
    torch.testing.assert_close(whole, torch.full((1, 3), 0.8))
    outside = importance_weights(Correction(high=2.0), old, engine, torch.zeros(1, 3, dtype=torch.bool))
    assert outside.tolist() == [[1.0, 1.0, 1.0]]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_penalties_estimate_the_divergence_of_two_coins(estimator):
    policy, reference = torch.log(torch.tensor([0.55, 0.45])), torch.log(torch.tensor([0.5, 0.5]))
    estimate = float((policy.exp() * penalty(policy, reference, estimator)).sum())
    divergence = float((policy.exp() * (policy - reference)).sum())
    assert estimate == pytest.approx(divergence, rel=0.02 if estimator == "k2" else 1e-5)


def test_k3_of_two_coins_is_their_divergence():
    # engine: heads with 0.5; trainer: 0.8. The mean over both outcomes, each as often as the engine gives it.
    engine, trainer = torch.log(torch.tensor([0.5, 0.5])), torch.log(torch.tensor([0.8, 0.2]))
    divergence = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)
    assert k3_divergence(trainer, engine) == pytest.approx(divergence, rel=1e-5)
    assert k3_divergence(engine, engine) == 0


def test_tokens_beyond_twice_as_likely_either_way_are_extreme():
    train, engine = torch.log(torch.tensor([0.9, 0.1, 0.5, 0.3])), torch.log(torch.tensor([0.3, 0.3, 0.5, 0.2]))
    assert extreme_fraction(train, engine) == 0.5
