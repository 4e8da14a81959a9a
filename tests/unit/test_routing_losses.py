"""Router losses against their closed forms, and buffered batches against concatenated ones. T tokens, E experts."""

import pytest
import torch
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter

from moestro.config import GlobalBatchLoss, ZLoss
from moestro.models.gating import GATINGS
from moestro.models.routing import RoutingRecord
from moestro.training.auxiliary import MicroBatch
from moestro.training.routing_losses import RoutingObjective
from moestro.training.routing_losses.balance import (
    GlobalBatchBalance,
    expert_counts,
    load_balancing_loss,
    load_variation,
    max_violation,
)
from moestro.training.routing_losses.z_loss import RouterZLoss, z_loss

MICRO = MicroBatch(torch.zeros(1, 2), torch.zeros(1), torch.zeros(1, 1, 1), torch.zeros(1))


def record_of(logits_TE: torch.Tensor, top_k: int = 2) -> RoutingRecord:
    weights, ids = logits_TE.softmax(-1).topk(top_k)
    return RoutingRecord(logits=[logits_TE, -logits_TE], ids=[ids, (-logits_TE).topk(top_k).indices], weights=[weights])


def objective(record: RoutingRecord, *, z: bool = False) -> RoutingObjective:
    """On routes given by hand: no model is asked."""
    made = RoutingObjective(None, [GlobalBatchBalance(GlobalBatchLoss(coefficient=1.0))])  # type: ignore[arg-type]
    if z:
        made.losses.append(RouterZLoss(ZLoss(coefficient=1.0)))
    made.record = record
    return made


def test_balanced_routing_costs_one() -> None:
    assert float(load_balancing_loss(torch.full((4,), 8.0), torch.full((16, 4), 0.25))) == pytest.approx(1.0)


def test_everything_to_one_expert_costs_the_number_of_experts() -> None:
    one_hot_TE = torch.zeros(16, 4)
    one_hot_TE[:, 2] = 1
    counts_E = expert_counts(torch.full((16, 1), 2), 4)
    assert float(load_balancing_loss(counts_E, one_hot_TE)) == pytest.approx(4.0)
    assert max_violation(counts_E) == pytest.approx(3.0)
    assert load_variation(counts_E) == pytest.approx(3**0.5)


def test_z_loss_of_uniform_logits() -> None:
    assert float(z_loss(torch.zeros(8, 4))) == pytest.approx(float(torch.tensor(4.0).log() ** 2))


def test_figures_of_micro_batches_are_those_of_the_concatenated_batch() -> None:
    """The figures, not what is trained: that takes each micro-batch's loads with those before it."""
    logits_TE = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    whole, parts = RoutingRecord(), RoutingRecord()
    one, many = objective(whole, z=True), objective(parts, z=True)
    whole.logits, whole.ids = record_of(logits_TE).logits, record_of(logits_TE).ids
    loss, trained = one.loss(MICRO), []
    for part_TE in logits_TE.chunk(4):
        parts.logits, parts.ids = record_of(part_TE).logits, record_of(part_TE).ids
        trained.append(float(many.loss(MICRO)))
    assert many.metrics() == pytest.approx(one.metrics(), rel=1e-6)
    assert one.metrics()["load_balancing_loss"] + one.metrics()["z_loss"] == pytest.approx(float(loss), rel=1e-6)
    assert sum(trained) / len(trained) != pytest.approx(float(loss), rel=1e-4)


def test_the_last_micro_batch_sees_the_counts_of_the_whole_step() -> None:
    """Its gradient is E f_i dP_i / layers with f over all micro-batches; the first sees only its own counts."""
    generator = torch.Generator().manual_seed(1)
    first_TE, last_TE = torch.randn(2, 16, 4, generator=generator)
    record = RoutingRecord()
    losses = objective(record)
    for step in range(2):  # a second step must start from empty buffers
        losses.begin(step, 2)
        for part_TE in (first_TE, last_TE):
            leaf_TE = part_TE.clone().requires_grad_()
            record.logits, record.ids = [leaf_TE], [leaf_TE.topk(1).indices]
            losses.loss(MICRO).backward()
        counts_E = expert_counts(torch.cat([first_TE, last_TE]).topk(1).indices, 4).float()
        check_TE = last_TE.clone().requires_grad_()
        load_balancing_loss(counts_E, check_TE.softmax(-1)).backward()
        torch.testing.assert_close(leaf_TE.grad, check_TE.grad, msg=f"step {step}")


def test_sigmoid_routers_are_balanced_on_normalised_sigmoids() -> None:
    """DeepSeek-V3's scores: half of them saturated must not hide that one expert gets everything."""
    logits_TE = torch.tensor([[9.0, 9.0, -1.0, -2.0], [9.0, 9.0, 0.5, 0.0]])
    ids_TK = torch.tensor([[0], [0]])
    record = RoutingRecord(logits=[logits_TE], ids=[ids_TK], gating=GATINGS[Glm4MoeTopkRouter])
    loss = objective(record).loss(MICRO)
    scores_TE = logits_TE.sigmoid()
    expected = 4 * (scores_TE[:, 0] / scores_TE.sum(-1)).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    softmax = RoutingRecord(logits=[logits_TE], ids=[ids_TK])
    assert float(objective(softmax).loss(MICRO)) != float(loss)


def test_the_balance_loss_pushes_the_crowded_expert_down() -> None:
    logits_TE = torch.zeros(8, 4)
    logits_TE[:, 1] = 1.0
    leaf_TE = logits_TE.requires_grad_()
    load_balancing_loss(torch.tensor([0.0, 8.0, 0.0, 0.0]), leaf_TE.softmax(-1)).backward()
    assert leaf_TE.grad is not None
    assert (leaf_TE.grad[:, 1] > 0).all()
    assert (leaf_TE.grad[:, [0, 2, 3]] < 0).all()
