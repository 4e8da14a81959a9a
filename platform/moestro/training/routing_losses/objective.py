"""`RoutingObjective`: all routing losses of a run together, and the loads that they and the metrics share.

E experts, K chosen per token; `sums` are of probabilities over tokens.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moestro.config import RoutingLossConfig
from moestro.models.routing import RoutingRecord, own_choices, record_routes
from moestro.training.auxiliary import MicroBatch
from moestro.training.parallel import total as total_over_workers
from moestro.training.routing_losses.balance import (
    expert_counts,
    load_balancing_loss,
    load_variation,
    max_violation,
)
from moestro.training.routing_losses.loss import Routing, RoutingLoss


class RoutingObjective:
    """The sum of `losses` on the routing of `model`; an `Auxiliary`."""

    def __init__(
        self, model: PreTrainedModel, losses: Sequence[RoutingLoss], configs: Sequence[RoutingLossConfig] = ()
    ) -> None:
        """`configs` are those that the losses were made from."""
        self.model = model
        self.configs = tuple(configs)
        self.losses = self.added = list(losses)
        self.record = RoutingRecord()
        self.begin(0, 1)

    def identity(self) -> tuple[RoutingLossConfig, ...]:
        """The losses' configs."""
        return self.configs

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Record routes, and whatever the losses put in place. Raises `InputError` for a model without routers."""
        with ExitStack() as stack:
            for loss in self.losses:
                stack.enter_context(loss.attached())
            self.record = stack.enter_context(record_routes(self.model))
            yield

    def begin(self, step: int, total: int) -> None:
        """Empty the buffers."""
        self.loads: list[Tensor] = []
        self.sums: list[Tensor] = []
        self.tokens = torch.zeros((), dtype=torch.float64)
        for loss in self.losses:
            loss.begin(step, total)

    def loss(self, micro: MicroBatch) -> Tensor:
        """The weighted sum of all losses (scalar), after adding the micro-batch to the buffers."""
        micro_loads = self._count()
        routing = Routing(self.record, micro, micro_loads, self.loads)
        terms = [loss.loss(routing) for loss in self.added]
        return torch.stack(terms).sum() if terms else torch.zeros(())

    def terms(self) -> tuple[str, ...]:
        """The losses' types."""
        return tuple(config.type for config in self.configs)

    @contextmanager
    def only(self, terms: Collection[str]) -> Iterator[None]:
        """Meanwhile the losses of other types add nothing to the sum, whatever else they do."""
        named = zip(self.terms(), self.losses, strict=True)
        self.added = [loss for name, loss in named if name in terms]
        try:
            yield
        finally:
            self.added = self.losses

    def end(self) -> None:
        """Let the losses see the step's loads."""
        for loss in self.losses:
            loss.end(self.loads)

    def metrics(self) -> dict[str, float]:
        """`load_balancing_loss` (mean over layers, of the whole step: that of the concatenated batch), `max_violation`
        (worst layer), `dead_experts`, each layer's load variation, and what the losses add.
        """
        balances = [
            float(load_balancing_loss(loads_E, (sums_E / self.tokens).unsqueeze(0)))
            for loads_E, sums_E in zip(self.loads, self.sums, strict=True)
        ]
        figures = {
            "load_balancing_loss": sum(balances) / len(balances),
            "max_violation": max(max_violation(loads_E) for loads_E in self.loads),
            "dead_experts": float(sum(int((loads_E == 0).sum()) for loads_E in self.loads)),
        }
        for layer, loads_E in enumerate(self.loads):
            figures[f"expert_load_variation/layer_{layer}"] = load_variation(loads_E)
        for loss in self.losses:
            figures |= loss.metrics()
        return figures

    def state(self) -> dict[str, Any]:
        """The losses' states, in their order."""
        return {"losses": [loss.state() for loss in self.losses]}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` returned."""
        for loss, saved in zip(self.losses, state["losses"], strict=True):
            loss.restore(saved)

    def _count(self) -> list[Tensor]:
        """Add the recorded micro-batch of all workers to the buffers; returns its own loads, by layer."""
        record = self.record
        rerouted = any(loss.reroutes for loss in self.losses)
        chosen = own_choices(self.model, record) if rerouted else record.ids
        micro_loads = []
        self.tokens = self.tokens + total_over_workers(torch.tensor(float(len(record.logits[0])), dtype=torch.float64))
        for layer, (logits_TE, ids_TK) in enumerate(zip(record.logits, chosen, strict=True)):
            loads_E = expert_counts(ids_TK, logits_TE.shape[-1])
            sums_E = record.gating.probabilities(logits_TE.detach()).double().sum(dim=0)
            loads_E, sums_E = total_over_workers(torch.stack([loads_E, sums_E])).unbind()
            micro_loads.append(loads_E)
            if layer == len(self.loads):
                self.loads.append(loads_E)
                self.sums.append(sums_E)
            else:
                self.loads[layer] = self.loads[layer] + loads_E
                self.sums[layer] = self.sums[layer] + sums_E
        return micro_loads
