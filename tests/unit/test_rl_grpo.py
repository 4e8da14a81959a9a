"""GRPO's formulas against closed forms and a plain loop."""

import math

import pytest
import torch

from moestro.rl.grpo import ADVANTAGE_EPS, group_advantages, k3_divergence, policy_loss


def test_advantages_of_one_success_among_four():
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5]]))
    std = 0.5  # sample standard deviation of (1, 0, 0, 0)
    expected = torch.tensor([0.75, -0.25, -0.25, -0.25]) / (std + ADVANTAGE_EPS)
    torch.testing.assert_close(advantages[0], expected)
    assert torch.equal(advantages[1], torch.zeros(4))


def plain_loss(new, old, advantages, mask, clip):
    total, clipped = 0.0, 0
    for b in range(new.shape[0]):
        for s in range(new.shape[1]):
            if not mask[b, s]:
                continue
            ratio = torch.exp(new[b, s] - old[b, s])
            free = ratio * advantages[b]
            bound = min(max(float(ratio.detach()), 1 - clip), 1 + clip) * advantages[b]
            total = total - (free if free <= bound else bound)
            clipped += int(bound < free)
    return total, clipped


def test_loss_and_gradients_are_those_of_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    new = torch.randn(5, 7, generator=generator, dtype=torch.float64).requires_grad_()
    old = (new + 0.4 * torch.randn(5, 7, generator=generator, dtype=torch.float64)).detach()
    advantages = torch.randn(5, generator=generator, dtype=torch.float64)
    mask = torch.rand(5, 7, generator=generator) < 0.6
    found = policy_loss(new, old, advantages, mask, clip=0.2)
    (gradient,) = torch.autograd.grad(found.total, new)
    expected, clipped = plain_loss(new, old, advantages, mask, 0.2)
    (expected_gradient,) = torch.autograd.grad(expected, new)
    torch.testing.assert_close(found.total, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    assert found.clipped == clipped > 0
    assert not gradient[~mask].any()


def test_on_policy_gradient_is_minus_the_advantage():
    new = torch.full((2, 3), -1.0, requires_grad=True)
    advantages = torch.tensor([2.0, -1.0])
    found = policy_loss(new, new.detach(), advantages, torch.ones(2, 3, dtype=torch.bool), clip=0.2)
    (gradient,) = torch.autograd.grad(found.total, new)
    torch.testing.assert_close(gradient, -advantages[:, None].expand(2, 3))
    assert found.clipped == 0


@pytest.mark.parametrize(("ratio", "advantage", "moves"), [(1.5, 1.0, False), (1.5, -1.0, True), (0.5, -1.0, False)])
def test_what_is_clipped_has_no_gradient(ratio, advantage, moves):
    new = torch.tensor([[math.log(ratio)]], requires_grad=True)
    found = policy_loss(new, torch.zeros(1, 1), torch.tensor([advantage]), torch.tensor([[True]]), clip=0.2)
    (gradient,) = torch.autograd.grad(found.total, new)
    assert bool(gradient.any()) is moves
    assert found.clipped == (0 if moves else 1)


def test_padding_far_off_does_not_poison_the_gradient():
    new = torch.tensor([[0.0, 500.0]], requires_grad=True)
    found = policy_loss(new, torch.zeros(1, 2), torch.tensor([1.0]), torch.tensor([[True, False]]), clip=0.2)
    (gradient,) = torch.autograd.grad(found.total, new)
    assert torch.equal(gradient, torch.tensor([[-1.0, 0.0]]))


def test_k3_of_two_coins_is_their_divergence():
    # engine: heads with 0.5; trainer: 0.8. The mean over both outcomes, each as often as the engine gives it.
    engine, trainer = torch.log(torch.tensor([0.5, 0.5])), torch.log(torch.tensor([0.8, 0.2]))
    divergence = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)
    assert k3_divergence(trainer, engine) == pytest.approx(divergence, rel=1e-5)
    assert k3_divergence(engine, engine) == 0
