"""Balance within micro-batches of one domain undoes specialisation, balance over the batch does not (arXiv 2501.11873).

A toy of branch training: each domain's tokens lie around a centre, and its expert alone maps them to their targets.
T tokens, D hidden, E experts, K chosen per token.
"""

import pytest
import torch

from moestro.config import GlobalBatchLoss, SwitchLoss
from moestro.models.routing import RoutingRecord
from moestro.training.auxiliary import MicroBatch
from moestro.training.routing_losses import RoutingLoss, RoutingObjective
from moestro.training.routing_losses.balance import GlobalBatchBalance, SwitchBalance

DOMAINS, HIDDEN, TOP_K, TOKENS, STEPS = 4, 16, 2, 64, 200
MICRO = MicroBatch(torch.zeros(1, 2), torch.zeros(1), torch.zeros(1, 1, 1), torch.zeros(1))


def trained(balance: RoutingLoss, seed: int) -> tuple[float, float]:
    """Share of a domain's choices that fall on its own expert (at most 1 / K), and the step's load balancing loss."""
    generator = torch.Generator().manual_seed(seed)
    centres_ED = torch.randn(DOMAINS, HIDDEN, generator=generator)
    experts_EDD = torch.randn(DOMAINS, HIDDEN, HIDDEN, generator=generator) / HIDDEN**0.5
    rows_ED = (0.01 * torch.randn(DOMAINS, HIDDEN, generator=generator)).requires_grad_()
    optimizer = torch.optim.Adam([rows_ED], lr=0.02)
    objective = RoutingObjective(None, [balance])  # type: ignore[arg-type]
    objective.record = record = RoutingRecord()
    for step in range(STEPS):
        objective.begin(step, STEPS)
        own = 0
        for domain in range(DOMAINS):
            tokens_TD = centres_ED[domain] + 0.5 * torch.randn(TOKENS, HIDDEN, generator=generator)
            logits_TE = tokens_TD @ rows_ED.T
            gates_TK, ids_TK = logits_TE.softmax(-1).topk(TOP_K)
            gates_TK = gates_TK / gates_TK.sum(-1, keepdim=True)
            made_TED = torch.einsum("td,eod->teo", tokens_TD, experts_EDD)
            output_TD = (gates_TK[:, :, None] * made_TED[torch.arange(TOKENS)[:, None], ids_TK]).sum(1)
            record.logits, record.ids = [logits_TE], [ids_TK]
            loss = (output_TD - made_TED[:, domain]).square().mean() + objective.loss(MICRO)
            (loss / DOMAINS).backward()
            own += int((ids_TK == domain).sum())
        optimizer.step()
        optimizer.zero_grad()
    return own / (DOMAINS * TOKENS * TOP_K), objective.metrics()["load_balancing_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_global_batch_balance_keeps_domains_apart_where_micro_batch_balance_does_not(seed: int) -> None:
    micro, micro_balance = trained(SwitchBalance(SwitchLoss(coefficient=10.0)), seed)
    whole, whole_balance = trained(GlobalBatchBalance(GlobalBatchLoss(coefficient=10.0)), seed)
    assert whole > 0.35  # 1 / E = 0.25 if tokens went anywhere, 1 / K = 0.5 at most
    assert whole > 1.25 * micro
    assert max(micro_balance, whole_balance) < 1.05
