"""Losses that decide which experts a token takes: dense training, undecided tokens, random partition.

T tokens, E experts, K chosen per token.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from moestro.config import BipBalance, MutualInformationLoss, RandomPartition, RoutingLossConfig, UncertainTokens
from moestro.errors import ConfigError
from moestro.models.gating import GATINGS, Gating, Routed
from moestro.models.rerouting import all_experts, reroute, skip_absent_experts
from moestro.models.routers import experts, routers
from moestro.models.routing import record_routes
from moestro.training.auxiliary import MicroBatch
from moestro.training.routing_losses import Context, RoutingObjective, routing_objective
from moestro.training.routing_losses.entropy import entropy
from moestro.training.routing_losses.loss import Routing, RoutingLoss
from moestro.training.routing_losses.mutual_information import DenseTraining, mutual_information
from moestro.training.routing_losses.random_partition import (
    RandomPartitionAveraging,
    draw_together,
    random_partition,
)
from moestro.training.routing_losses.schedule import linear
from moestro.training.routing_losses.uncertain_tokens import UncertainTokenBroadcast, undecided
from moestro_kernels.experts_mlp import register

pytestmark = pytest.mark.usefixtures("one_thread")

Models = Callable[..., PreTrainedModel]
TOKENS_BS = torch.randint(0, 320, (3, 17), generator=torch.Generator().manual_seed(0))
DOMAINS_B = torch.zeros(3, dtype=torch.long)
MICRO = MicroBatch(TOKENS_BS, DOMAINS_B, torch.zeros(3, 16, 1), DOMAINS_B)


def trained_once(model: PreTrainedModel, loss: RoutingLoss) -> tuple[RoutingObjective, torch.Tensor]:
    """One micro-batch forward and backward; what the model's last layer gave."""
    objective = RoutingObjective(model, [loss])
    with objective.attached():
        objective.begin(0, 4)
        hidden_BSD = model.base_model(input_ids=TOKENS_BS[:, :-1], use_cache=False).last_hidden_state
        micro = MicroBatch(TOKENS_BS, DOMAINS_B, hidden_BSD, DOMAINS_B)
        (hidden_BSD.square().mean() + objective.loss(micro)).backward()
    return objective, hidden_BSD.detach()


def test_mutual_information_of_sure_balanced_routing_is_the_logarithm_of_the_experts() -> None:
    sure_TE = torch.eye(4).repeat(5, 1)
    assert float(mutual_information(sure_TE)) == pytest.approx(math.log(4))
    assert float(mutual_information(torch.full((8, 4), 0.25))) == pytest.approx(0, abs=1e-6)
    assert float(mutual_information(torch.eye(4)[[1] * 8])) == pytest.approx(0, abs=1e-6)
    half_TE = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    assert float(mutual_information(half_TE)) == pytest.approx(math.log(2))


def test_the_gradient_of_mutual_information() -> None:
    logits_TE = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert torch.autograd.gradcheck(lambda leaf: mutual_information(leaf.softmax(-1)), logits_TE)
    saturated_TE = torch.tensor([[400.0, 0.0, 0.0]], requires_grad=True)
    entropy(saturated_TE.softmax(-1)).sum().backward()
    assert saturated_TE.grad is not None
    assert saturated_TE.grad.isfinite().all()


def test_the_loss_makes_routing_sure_and_balanced() -> None:
    """From routing that prefers one expert and is undecided, to all experts alike and each token sure of its own."""
    logits_TE = torch.randn(64, 4, generator=torch.Generator().manual_seed(2)) * 0.1
    logits_TE[:, 0] += 0.5
    assert float(mutual_information(logits_TE.softmax(-1))) < 0.01
    leaf_TE = logits_TE.requires_grad_()
    optimizer = torch.optim.Adam([leaf_TE], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        (-mutual_information(leaf_TE.softmax(-1))).backward()
        optimizer.step()
    probabilities_TE = leaf_TE.detach().softmax(-1)
    assert float(mutual_information(probabilities_TE)) > 0.94 * math.log(4)
    assert float(probabilities_TE.max(dim=-1).values.mean()) > 0.98
    assert torch.bincount(probabilities_TE.argmax(-1), minlength=4).max() <= 2 * 16


def test_dense_training_passes_all_experts(tiny_moe: Models, moe_kind: str) -> None:
    """Each with the gate its router would give it among all; every expert and every logit learns."""
    model = tiny_moe(moe_kind).train()
    dense = DenseTraining(MutualInformationLoss(coefficient=2.0), model)
    objective, _ = trained_once(model, dense)
    for router, logits_TE, ids_TE, gates_TE in zip(
        routers(model), objective.record.logits, objective.record.ids, objective.record.weights, strict=True
    ):
        scores_TE = logits_TE.sigmoid() if GATINGS[type(router)].sigmoid else logits_TE.softmax(-1)
        scale = getattr(router, "routed_scaling_factor", 1.0)
        expected_TE = scale * scores_TE / scores_TE.sum(-1, keepdim=True)
        torch.testing.assert_close(gates_TE, expected_TE.gather(1, ids_TE), rtol=1e-5, atol=1e-7)
        assert torch.equal(ids_TE.sort(dim=-1).values, torch.arange(6).expand(48, -1))
    for module in experts(model):
        for parameter in module.parameters():
            assert parameter.grad is not None
            assert (parameter.grad.flatten(1).abs().sum(dim=1) > 0).all()
    assert all(router.weight.grad is not None for router in routers(model))
    assert 0 <= objective.metrics()["mutual_information"] <= math.log(6)
    mean = sum(float(mutual_information(logits_TE.detach().softmax(-1))) for logits_TE in objective.record.logits) / 2
    if not GATINGS[type(routers(model)[0])].sigmoid:
        assert float(dense.loss(Routing(objective.record, MICRO, [], [])).detach()) == pytest.approx(
            -2 * mean, rel=1e-5
        )
    assert float(torch.stack(objective.loads).sum()) == 2 * 48 * 2  # loads stay those of the top K


@pytest.mark.parametrize("kind", ["mixtral", "granitemoe", "glm4_moe"])
def test_every_experts_implementation_takes_all_experts(tiny_moe: Models, kind: str) -> None:
    register()
    model = tiny_moe(kind).train()
    outputs = {}
    for implementation in ("eager", "grouped_mm", "moestro"):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        _, hidden_BSD = trained_once(model, DenseTraining(MutualInformationLoss(), model))
        gradients = [parameter.grad for module in experts(model) for parameter in module.parameters()]
        outputs[implementation] = [hidden_BSD, *gradients]
    for implementation in ("grouped_mm", "moestro"):
        for mine, eager in zip(outputs[implementation], outputs["eager"], strict=True):
            torch.testing.assert_close(mine, eager, rtol=1e-4, atol=1e-5)


def test_the_threshold_of_indecision_is_a_share_of_the_largest_entropy() -> None:
    uniform, half, sure = [0.25] * 4, [0.5, 0.5, 0, 0], [1.0, 0, 0, 0]
    probabilities_TE = torch.tensor([uniform, half, sure])
    assert undecided(probabilities_TE, 0.51).tolist() == [True, False, False]
    assert undecided(probabilities_TE, 0.49).tolist() == [True, True, False]


def test_all_experts_lists_the_chosen_first() -> None:
    routed = Routed(torch.zeros(2, 4), torch.ones(2, 2), torch.tensor([[3, 1], [0, 2]]))
    assert all_experts(routed).tolist() == [[3, 1, 0, 2], [0, 2, 1, 3]]


def test_undecided_tokens_train_all_experts_and_the_others_their_own(tiny_moe: Models, moe_kind: str) -> None:
    """In the first layer, whose input is the same with and without: tokens below the threshold give the same bits."""
    model = tiny_moe(moe_kind)
    outputs: list[torch.Tensor] = []
    handle = experts(model)[0].register_forward_hook(lambda _m, _a, output: outputs.append(output.detach()))
    with record_routes(model) as record, torch.no_grad():
        model(input_ids=TOKENS_BS[:, :-1])
        chosen_TK = record.ids[0]
        shares_T = entropy(record.gating.probabilities(record.logits[0])) / math.log(6)
        threshold = float(shares_T.median())
    model.train()
    broadcast = UncertainTokenBroadcast(UncertainTokens(threshold=threshold), model)
    objective, _ = trained_once(model, broadcast)
    broadcast.end([])
    handle.remove()
    wide_T = undecided(objective.record.gating.probabilities(objective.record.logits[0]), threshold)
    assert 10 < int(wide_T.sum()) < 40
    gates_TE = torch.zeros(48, 6).scatter(1, objective.record.ids[0], objective.record.weights[0].detach())
    assert (gates_TE[wide_T] > 0).all()
    assert torch.equal(gates_TE[~wide_T].count_nonzero(dim=1), torch.full((int((~wide_T).sum()),), 2))
    assert (gates_TE[~wide_T].gather(1, chosen_TK[~wide_T]) > 0).all()
    plain_TD, broadcast_TD = (output.flatten(0, -2) for output in outputs[:2])
    # Six experts are summed where two were, most of them times 0, in an order of the CPU's: some roundings apart.
    torch.testing.assert_close(broadcast_TD[~wide_T], plain_TD[~wide_T], rtol=1e-5, atol=5e-6)
    assert not torch.allclose(broadcast_TD[wide_T], plain_TD[wide_T], rtol=1e-3)
    assert 0 < objective.metrics()["uncertain_tokens"] < 1


def test_skipping_absent_experts_changes_no_result(tiny_moe: Models) -> None:
    """Against computing all experts for all tokens, gates of zero included; values and gradients."""

    def decide(_layer: int, router: Any, gating: Gating, routed: Routed) -> Routed:
        ids_TE = all_experts(routed)
        gates_TE = gating.gates(router, routed, ids_TE)
        gates_TE = torch.where((torch.arange(len(ids_TE)) % 3 == 0).unsqueeze(1), gates_TE, 0.0)
        gates_TE[:, :2] += 0.25
        return Routed(routed.logits, gates_TE, ids_TE)

    model = tiny_moe("qwen3_moe").train()
    results = []
    for skip in (False, True):
        model.zero_grad()
        with reroute(model, decide), skip_absent_experts(model) if skip else nullcontext():
            hidden = model.base_model(input_ids=TOKENS_BS[:, :-1]).last_hidden_state
        hidden.square().mean().backward()
        results.append([hidden.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert "forward" not in vars(experts(model)[0])
    for with_skip, without in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(with_skip, without, rtol=1e-4, atol=1e-6)


def test_a_partition_is_even_random_and_repeatable() -> None:
    ids_T = random_partition(50, 4, 0, 3, 1, 0, 0)
    counts_E = torch.bincount(ids_T, minlength=4)
    assert counts_E.max() - counts_E.min() <= 1
    assert torch.equal(ids_T, random_partition(50, 4, 0, 3, 1, 0, 0))
    others = [random_partition(50, 4, *key) for key in ((1, 3, 1, 0, 0), (0, 4, 1, 0, 0), (0, 3, 0, 0, 0))]
    assert all(not torch.equal(ids_T, other_T) for other_T in others)
    totals_E = sum(torch.bincount(random_partition(50, 4, 0, step), minlength=4) for step in range(200))
    assert (totals_E - 2500).abs().max() < 60  # nobody always gets the surplus
    first_token = torch.tensor([random_partition(50, 4, 0, step)[0] for step in range(400)])
    assert torch.bincount(first_token, minlength=4).min() > 70


def test_drawing_together_keeps_the_mean_and_shrinks_distances() -> None:
    weights_EF = torch.randn(4, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    before, mean = weights_EF.clone(), weights_EF.mean(dim=0)
    draw_together(weights_EF, 0.3)
    by_hand = torch.stack([0.7 * before[i] + 0.3 * before[[j for j in range(4) if j != i]].mean(0) for i in range(4)])
    torch.testing.assert_close(weights_EF, by_hand)
    torch.testing.assert_close(weights_EF.mean(dim=0), mean)
    torch.testing.assert_close(weights_EF - mean, (1 - 0.3 * 4 / 3) * (before - mean))


def test_random_partition_routes_by_lot_and_draws_experts_together(tiny_moe: Models, moe_kind: str) -> None:
    model = tiny_moe(moe_kind).train()
    averaging = RandomPartitionAveraging(RandomPartition(share=0.5), model)
    objective, _ = trained_once(model, averaging)
    for layer, (ids_T1, gates_T1) in enumerate(zip(objective.record.ids, objective.record.weights, strict=True)):
        assert torch.equal(ids_T1.squeeze(1), random_partition(48, 6, 0, 0, 0, layer))
        router = routers(model)[layer]
        logits_TE = objective.record.logits[layer]
        own_TK = GATINGS[type(router)].choose(router, logits_TE)
        own = GATINGS[type(router)].gates(router, Routed(logits_TE, gates_T1, own_TK), own_TK)
        torch.testing.assert_close(gates_T1, own.sum(-1, keepdim=True).detach(), rtol=1e-5, atol=1e-6)
    assert all(router.weight.grad is None for router in routers(model))
    before = objective.metrics()["expert_distance"]
    objective.begin(3, 4)
    objective.end()
    metrics = averaging.metrics()
    assert metrics["expert_distance"] == pytest.approx((1 - 0.5 * 6 / 5) * before, rel=1e-4)
    assert metrics["averaging_share"] == 0.5


def test_the_share_rises_linearly_from_nothing() -> None:
    assert [linear(0.0, 0.4, step, 5) for step in range(5)] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert linear(0.1, 0.0, 0, 1) == 0.0


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (BipBalance(), "glm4_moe"),
        (MutualInformationLoss(), "glm4_moe"),
        (MutualInformationLoss(), "mixtral"),
        (UncertainTokens(threshold=0.01), "mixtral"),
        (RandomPartition(), "mixtral"),
    ],
    ids=lambda value: getattr(value, "type", value),
)
def test_where_all_experts_are_chosen_there_is_nothing_left_to_decide(
    tiny_moe: Models, config: RoutingLossConfig, kind: str
) -> None:
    """K = E: all experts, or the best balanced K, are what the router chooses itself; a lot still is one."""
    model = tiny_moe(kind, num_experts_per_tok=6)
    with torch.no_grad():
        served = model.base_model(input_ids=TOKENS_BS[:, :-1]).last_hidden_state
    (loss,) = routing_objective([config], Context(model.train(), [["code"] * 6] * 2, ("code",))).losses
    objective, trained = trained_once(model, loss)
    objective.end()
    assert all(math.isfinite(value) for value in objective.metrics().values())
    if config.type != "random_partition":
        torch.testing.assert_close(trained, served, rtol=1e-4, atol=1e-5)


def test_a_share_that_draws_experts_beyond_their_mean_is_refused(tiny_moe: Models) -> None:
    model = tiny_moe("mixtral", num_experts=4)
    averaging = RandomPartitionAveraging(RandomPartition(share=0.75), model)
    averaging.begin(3, 4)
    averaging.end([])
    assert averaging.metrics()["expert_distance"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(ConfigError, match=r"share of 0.8 draws 4 experts beyond their mean.*3/4.*Lower it"):
        RandomPartitionAveraging(RandomPartition(share=0.8), model)


def test_one_expert_cannot_be_averaged(tiny_moe: Models) -> None:
    model = tiny_moe("mixtral", num_experts=1, num_experts_per_tok=1)
    with pytest.raises(ConfigError, match=r"random_partition.*one per layer.*Leave it out"):
        RandomPartitionAveraging(RandomPartition(), model)
