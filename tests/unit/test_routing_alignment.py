"""RoMA and domain supervision: what each draws routing to. B sequences, T tokens, E experts, R routing features."""

import math
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from moestro.config import DomainSupervision, RomaLoss
from moestro.data.packed import Batch
from moestro.errors import ConfigError
from moestro.models.routers import routers
from moestro.training.auxiliary import MicroBatch
from moestro.training.objective import backward, next_token_loss
from moestro.training.routing_losses import RoutingObjective
from moestro.training.routing_losses.domain_supervision import DomainRouting, own_experts, supervision_loss
from moestro.training.routing_losses.loss import RoutingLoss
from moestro.training.routing_losses.roma import (
    RoutingAlignment,
    alignment_loss,
    neighbour_weights,
    predicted_well,
    sequence_losses,
)

Models = Callable[..., PreTrainedModel]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def learn(
    model: PreTrainedModel, loss: RoutingLoss, micro: tuple[torch.Tensor, torch.Tensor], steps: int
) -> list[dict]:
    """Train the routers alone by `loss` alone; figures of each step."""
    rows = []
    objective = RoutingObjective(model, [loss])
    optimizer = torch.optim.Adam([router.weight for router in routers(model)], lr=1e-2)
    with objective.attached():
        for step in range(steps):
            objective.begin(step, steps)
            _, hidden_BSD = next_token_loss(model, micro[0])
            optimizer.zero_grad()
            objective.loss(MicroBatch(*micro, hidden_BSD, micro[1])).backward()
            optimizer.step()
            objective.end()
            rows.append(objective.metrics())
    return rows


def test_each_domain_has_a_better_half() -> None:
    """Domain 1 is harder throughout; its better half counts all the same, and the odd one is in it."""
    losses_G = torch.tensor([1.0, 9.0, 2.0, 7.0, 3.0, 8.0, 4.0, 5.0])
    domains_G = torch.tensor([0, 1, 0, 1, 0, 1, 0, 2])
    assert predicted_well(losses_G, domains_G).tolist() == [True, False, True, True, False, True, False, True]


def test_neighbours_are_near_and_well_predicted() -> None:
    """Sequences 0 and 1 are alike and well predicted, so is 2, but apart; 3 and 4 are like 0 and badly predicted."""
    embedding_BD = torch.tensor([[1.0, 0.0], [3.0, 0.3], [0.0, 1.0], [1.0, 0.02], [1.0, 0.1]])
    well_B = predicted_well(torch.tensor([1.0, 2.0, 1.5, 9.0, 8.0]), torch.zeros(5))
    one_BB = neighbour_weights(embedding_BD, well_B, neighbours=1, bandwidth=0.4)
    assert one_BB.argmax(dim=-1).tolist() == [1, 0, 1, 0, 1]
    assert (one_BB.count_nonzero(dim=-1) == 1).all()
    weights_BB = neighbour_weights(embedding_BD, well_B, neighbours=4, bandwidth=0.4)
    torch.testing.assert_close(weights_BB.sum(dim=-1), torch.ones(5))
    assert not weights_BB[:, 3:].any()
    assert not weights_BB.diagonal().any()
    unit_BD = functional.normalize(embedding_BD, dim=-1)
    gaussian = [math.exp(-float((unit_BD[0] - unit_BD[j]).square().sum()) / (2 * 0.4**2)) for j in (1, 2)]
    assert weights_BB[0, 1:3].tolist() == pytest.approx([value / sum(gaussian) for value in gaussian], rel=1e-5)


def test_a_narrow_gaussian_keeps_the_nearest_and_a_lone_sequence_has_no_neighbour() -> None:
    embedding_BD, well_B = torch.randn(6, 8, generator=generator(0)), torch.arange(6) < 3
    narrow_BB = neighbour_weights(embedding_BD, well_B, neighbours=3, bandwidth=1e-3)
    torch.testing.assert_close(narrow_BB.sum(dim=-1), torch.ones(6))
    assert neighbour_weights(embedding_BD[:1], well_B[:1], neighbours=3, bandwidth=0.4).tolist() == [[0.0]]
    two_BB = neighbour_weights(embedding_BD[:2], torch.tensor([True, False]), neighbours=3, bandwidth=0.4)
    assert two_BB.tolist() == [[0.0, 0.0], [1.0, 0.0]]


def test_the_alignment_loss_draws_a_sequence_to_its_neighbours_and_not_them_to_it() -> None:
    routing_BR = torch.randn(3, 5, dtype=torch.float64, generator=generator(1), requires_grad=True)
    weights_BB = torch.tensor([[0.0, 0.25, 0.75], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    loss = alignment_loss(routing_BR, routing_BR, weights_BB)
    r = routing_BR.detach()
    by_hand = (
        0.25 * (r[0] - r[1]).square().sum() + 0.75 * (r[0] - r[2]).square().sum() + (r[2] - r[1]).square().sum()
    ) / 3
    torch.testing.assert_close(loss.detach(), by_hand)
    (gradient_BR,) = torch.autograd.grad(loss, routing_BR)
    expected_BR = torch.stack([2 * (r[0] - 0.25 * r[1] - 0.75 * r[2]), torch.zeros(5), 2 * (r[2] - r[1])]) / 3
    torch.testing.assert_close(gradient_BR, expected_BR)

    def of_the_first(first_R: torch.Tensor) -> torch.Tensor:
        return alignment_loss(torch.stack([first_R, r[1], r[2]]), r, weights_BB)

    assert torch.autograd.gradcheck(of_the_first, r[0].clone().requires_grad_())


@pytest.mark.parametrize("kind", ["mixtral", "granitemoe"])
def test_sequence_losses_are_those_of_the_model(tiny_moe: Models, kind: str) -> None:
    model = tiny_moe(kind)
    tokens_BS = torch.randint(0, 320, (3, 9), generator=generator(2))
    loss, hidden_BSD = next_token_loss(model, tokens_BS)
    losses_B = sequence_losses(
        model.get_output_embeddings(), MicroBatch(tokens_BS, torch.zeros(3), hidden_BSD, torch.zeros(3))
    )
    assert float(losses_B.mean()) == pytest.approx(float(loss.detach()), rel=1e-5)
    with torch.no_grad():
        logits_SV = model(input_ids=tokens_BS[1:2, :-1]).logits[0]
    assert float(losses_B[1]) == pytest.approx(float(functional.cross_entropy(logits_SV, tokens_BS[1, 1:])), rel=1e-5)


def test_routing_takes_the_shape_of_the_embeddings() -> None:
    """Two kinds of sequences whose router inputs are noisier than their embeddings: the noise is what routing loses."""
    kind_BD = torch.eye(2).repeat_interleave(8, dim=0)
    embedding_BD = kind_BD + 0.05 * torch.randn(16, 2, generator=generator(6))
    features_BD = torch.cat([kind_BD, torch.randn(16, 6, generator=generator(7))], dim=-1)
    weight_DE = torch.randn(8, 4, generator=generator(8)).requires_grad_()
    well_B = predicted_well(torch.rand(16, generator=generator(9)), torch.zeros(16))
    weights_BB = neighbour_weights(embedding_BD, well_B, neighbours=3, bandwidth=0.4)
    optimizer = torch.optim.Adam([weight_DE], lr=1e-2)
    ratios = []
    for _ in range(100):
        routing_BE = (features_BD @ weight_DE).softmax(-1)
        distance_BB = torch.cdist(routing_BE.detach(), routing_BE.detach()).square()
        within = distance_BB[:8, :8].sum() + distance_BB[8:, 8:].sum()
        ratios.append(float(within / distance_BB[:8, 8:].sum()))
        optimizer.zero_grad()
        alignment_loss(routing_BE, routing_BE, weights_BB).backward()
        optimizer.step()
    assert ratios[-1] < 0.5 * ratios[0]


@pytest.mark.parametrize("kind", ["mixtral", "glm4_moe grouped", "granitemoe"])
def test_neighbours_come_to_take_like_routes(tiny_moe: Models, kind: str) -> None:
    model = tiny_moe(kind)
    low_BS = torch.randint(0, 160, (4, 25), generator=generator(3))
    tokens_BS = torch.cat([low_BS, 160 + torch.randint(0, 160, (4, 25), generator=generator(4))])
    alignment = RoutingAlignment(RomaLoss(coefficient=1.0, layers=1, neighbours=1), model)
    rows = learn(model, alignment, (tokens_BS, torch.zeros(8, dtype=torch.long)), 30)
    assert rows[-1]["routing_distance"] < 0.5 * rows[0]["routing_distance"]


def test_own_experts_share_the_target() -> None:
    (own_CE,) = own_experts([["code", "math", "code", "seed"]], ("code", "math", "prose"))
    assert own_CE.tolist() == [[True, False, True, False], [False, True, False, False], [False] * 4]
    probabilities_TE = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4]])
    loss = supervision_loss(probabilities_TE, own_CE[torch.tensor([0, 1, 2])], 2)
    code, math_ = -(math.log(0.5) + math.log(0.125)) / 2, -math.log(0.25)
    assert float(loss) == pytest.approx((code + math_) / 2)  # prose has no expert: it is left alone
    assert float(supervision_loss(probabilities_TE, own_CE[torch.tensor([2, 2, 2])], 0)) == 0.0


def test_the_gradient_of_supervision() -> None:
    logits_TE = torch.randn(4, 3, dtype=torch.float64, generator=generator(5), requires_grad=True)
    own_TE = torch.tensor([[True, False, False], [False, True, True], [False] * 3, [True, True, False]])
    assert torch.autograd.gradcheck(lambda leaf: supervision_loss(leaf.softmax(-1), own_TE, 3), logits_TE)
    (gradient_TE,) = torch.autograd.grad(supervision_loss(logits_TE.softmax(-1), own_TE, 3), logits_TE)
    target_TE = own_TE.double() / own_TE.sum(-1, keepdim=True).clamp_min(1)
    expected_TE = (logits_TE.detach().softmax(-1) - target_TE) / 3
    expected_TE[2] = 0
    torch.testing.assert_close(gradient_TE, expected_TE)


def test_the_weight_of_supervision_goes_linearly_to_its_end(tiny_moe: Models) -> None:
    origins = [["code", "math", "seed", "seed", "seed", "seed"]] * 2
    supervision = DomainRouting(
        DomainSupervision(coefficient=0.4, final_coefficient=0.1), tiny_moe("mixtral"), origins, ("code",)
    )
    coefficients = []
    for step in range(4):
        supervision.begin(step, 4)
        coefficients.append(supervision.coefficient)
    assert coefficients == pytest.approx([0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize("kind", ["qwen3_moe", "glm4_moe", "granitemoe"])
def test_tokens_of_a_domain_come_to_their_expert(tiny_moe: Models, kind: str) -> None:
    model = tiny_moe(kind)
    origins = [["code", "math", "seed", "seed", "math", "seed"], ["seed", "code", "math", "seed", "seed", "seed"]]
    low_BS = torch.randint(0, 160, (4, 25), generator=generator(3))
    tokens_BS = torch.cat([low_BS, 160 + torch.randint(0, 160, (4, 25), generator=generator(4))])
    domains_B = torch.tensor([0] * 4 + [2] * 4)  # of code, prose and math
    config = DomainSupervision(coefficient=1.0, final_coefficient=1.0)
    supervision = DomainRouting(config, model, origins, ("code", "prose", "math"))
    rows = learn(model, supervision, (tokens_BS, domains_B), 60)
    assert set(rows[0]) >= {"own_expert/code", "own_expert/math", "domain_supervision"}
    assert "own_expert/prose" not in rows[0]
    for domain in ("code", "math"):
        assert rows[-1][f"own_expert/{domain}"] > max(0.85, rows[0][f"own_expert/{domain}"])
    assert rows[-1]["domain_supervision"] < 0.7 * rows[0]["domain_supervision"]


@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_every_supervised_token_counts_alike_however_the_batch_is_split(tiny_moe: Models, accumulation: int) -> None:
    """Some micro-batches have no token of `code`, the one domain that has an expert in the first layer."""
    model = tiny_moe("mixtral")
    origins = [["code", *["seed"] * 5], ["code", "math", *["seed"] * 4]]
    tokens_BS = torch.randint(0, 320, (8, 9), generator=generator(10))
    batch = Batch(tokens_BS, torch.tensor([0, 1, 0, 1, 1, 1, 1, 2]), torch.zeros(8, 9, dtype=torch.bool))
    found = []
    for parts in (1, accumulation):
        supervision = DomainRouting(DomainSupervision(coefficient=1.0), model, origins, ("code", "math", "prose"))
        objective = RoutingObjective(model, [supervision])
        model.zero_grad()
        with objective.attached():
            backward(model, batch, accumulation=parts, dtype=torch.float32, auxiliary=objective)
        objective.end()
        figures = supervision.metrics()
        found.append((figures, [router.weight.grad for router in routers(model)]))
    (whole, whole_gradients), (split, gradients) = found
    assert split == pytest.approx(whole, rel=1e-5)
    for gradient_ED, whole_ED in zip(gradients, whole_gradients, strict=True):
        torch.testing.assert_close(gradient_ED, whole_ED, rtol=1e-4, atol=1e-7)


def test_supervision_needs_an_expert_of_a_domain(tiny_moe: Models) -> None:
    with pytest.raises(ConfigError, match=r"none comes from code, math\..*Experts come from prose, seed"):
        DomainRouting(DomainSupervision(), tiny_moe("mixtral"), [["seed", "prose"]] * 2, ("code", "math"))
