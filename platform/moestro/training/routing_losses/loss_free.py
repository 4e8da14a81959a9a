"""Balance without a loss: each step moves the correction bias towards even loads (Loss-Free Balancing,
arXiv 2408.15664, algorithm 1; DeepSeek-V3, 2412.19437, section 2.1.2).

After the optimiser's step, with c_i the choices of expert i over the whole step, all workers included,
    b_i <- b_i + u sign(mean(c) - c_i)
and tokens take the top K of s + b with the gates of s alone. No gradient is added. As a step moves a bias by u at most,
an advantage of d in score takes d / u steps to even out. E experts, K chosen per token.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moestro.config import LossFreeBalance
from moestro.training.routing_losses.correction_bias import biased_routers, biases, spread
from moestro.training.routing_losses.loss import RoutingLoss


def bias_step(loads_E: Tensor, update_rate: float) -> Tensor:
    """What a step adds to the bias, [E]: `update_rate` up for too few choices, down for too many, 0 for the mean."""
    return update_rate * torch.sign(loads_E.mean() - loads_E)


class LossFreeBalancing(RoutingLoss):
    """Moves the correction bias of every router of `model`. Raises `ConfigError` if they have none."""

    def __init__(self, config: LossFreeBalance, model: PreTrainedModel) -> None:
        self.update_rate = config.update_rate
        self.routers = biased_routers(model, config.type)

    def end(self, loads: list[Tensor]) -> None:
        """The sign update, by the step's loads."""
        for bias_E, loads_E in zip(biases(self.routers), loads, strict=True):
            bias_E.add_(bias_step(loads_E, self.update_rate).to(bias_E.dtype))

    def metrics(self) -> dict[str, float]:
        """`correction_bias_spread`: largest less smallest bias of a layer, the most of all layers."""
        return {"correction_bias_spread": spread(self.routers)}
