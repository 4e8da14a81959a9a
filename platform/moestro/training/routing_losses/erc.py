"""Rows and experts drawn together by weights alone: the expert-router coupling loss (ERC, arXiv 2512.23447, section 3).

Per layer, with R the router's rows and W_j the gate_proj of expert j,
    M[i, j] = |W_j r_i (1 + d_i)|,   d_i uniform in [-e_i, e_i] per component,   e_i = |r_i - r_j| / (2 |r_i|)
    L = 1/N^2 sum_i sum_{j != i} max(M_ij - a M_ii, 0) + max(M_ji - a M_ii, 0)
with r_j the nearest other row: the proxy stands for the tokens that row i wins. d is drawn once per layer and step, and
no gradient flows through e; routing uses the rows as they are. The gradient reaches rows and gate_proj. Tokens play no
part: the cost is 2 N^2 D F a layer and micro-batch, and nothing where the model is served.

The formulas are `models.coupling`, which rows can also start from (`mix.router: erc`).
N experts, D hidden, F intermediate.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moestro.config import ErcLoss
from moestro.models.coupling import activation_norms, diagonal_dominance, erc_loss, row_noise
from moestro.models.routers import experts, routers
from moestro.training.routing_losses.loss import Routing, RoutingLoss


class ExpertRouterCoupling(RoutingLoss):
    """The loss on all sparse layers of `model`; its noise generator's state is resumed."""

    def __init__(self, config: ErcLoss, model: PreTrainedModel) -> None:
        self.coefficient = config.coefficient
        self.alpha = config.alpha
        self.routers: list[Any] = routers(model)
        self.experts: list[Any] = experts(model)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.noise: list[Tensor] = []
        self.values: list[float] = []

    def begin(self, step: int, total: int) -> None:  # noqa: ARG002
        """Forget the noise of the step before."""
        self.noise, self.values = [], []

    def loss(self, routing: Routing) -> Tensor:  # noqa: ARG002
        """Mean over layers, weighted; the same for every micro-batch of a step."""
        if not self.noise:
            self.noise = [row_noise(rows_ND, self.generator) for rows_ND in self._rows()]
        layers = [
            erc_loss(activation_norms(rows_ND * (1 + noise_ND), gates_NFD), self.alpha)
            for rows_ND, noise_ND, gates_NFD in zip(self._rows(), self.noise, self._gates(), strict=True)
        ]
        value = torch.stack(layers).mean()
        self.values.append(float(value.detach()))
        return self.coefficient * value

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """`erc_loss`, unweighted; `diagonal_dominance` and `diagonal_margin` (`models.coupling`) of the weights after
        the step, without noise; means over layers."""
        layers = [
            diagonal_dominance(activation_norms(rows_ND, gates_NFD))
            for rows_ND, gates_NFD in zip(self._rows(), self._gates(), strict=True)
        ]
        shares, margins = zip(*layers, strict=True)
        return {
            "erc_loss": sum(self.values) / len(self.values),
            "diagonal_dominance": sum(shares) / len(shares),
            "diagonal_margin": sum(margins) / len(margins),
        }

    def state(self) -> dict[str, Any]:
        """The generator's state."""
        return {"generator": self.generator.get_state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Draw on from there."""
        self.generator.set_state(state["generator"])

    def _rows(self) -> list[Tensor]:
        return [router.weight.float() for router in self.routers]

    def _gates(self) -> list[Tensor]:
        """Each layer's gate_proj [N, F, D], the upper half of what is stored for both projections."""
        fused = [module.gate_up_proj for module in self.experts]
        return [both_NGD[:, : both_NGD.shape[1] // 2].float() for both_NGD in fused]
