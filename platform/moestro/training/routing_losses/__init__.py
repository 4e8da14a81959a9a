"""Losses and rules on routing: one per file, behind `RoutingLoss`, chosen by config from a literal registry."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from moestro.config import GlobalBatchLoss, RoutingLossConfig, SwitchLoss, ZLoss
from moestro.errors import ConfigError
from moestro.models.gating import GATINGS
from moestro.models.routers import routers
from moestro.training.routing_losses.balance import GlobalBatchBalance, SwitchBalance
from moestro.training.routing_losses.loss import Routing, RoutingLoss
from moestro.training.routing_losses.objective import RoutingObjective
from moestro.training.routing_losses.z_loss import RouterZLoss

__all__ = ["LOSSES", "Context", "Routing", "RoutingLoss", "RoutingObjective", "routing_objective"]


@dataclass(frozen=True)
class Context:
    """What a loss may need to know besides its config."""

    model: PreTrainedModel
    """The model that is trained."""
    origins: list[list[str]]
    """What each expert was made from, per layer."""
    domains: tuple[str, ...]
    """The mixture's domains, in the order that batches number them."""


LOSSES: dict[type[Any], Callable[[Any, Context], RoutingLoss]] = {
    SwitchLoss: lambda config, _: SwitchBalance(config),
    GlobalBatchLoss: lambda config, _: GlobalBatchBalance(config),
    ZLoss: lambda config, _: RouterZLoss(config),
}
"""By class of config."""


def routing_objective(configs: Sequence[RoutingLossConfig], context: Context) -> RoutingObjective:
    """The objective of `configs` on a model. Raises `ConfigError` for a loss that its routers cannot take."""
    for config in configs:
        if config.type == "z_loss" and GATINGS[type(routers(context.model)[0])].sigmoid:
            raise ConfigError(
                "tune.losses: the model's routers score by sigmoids, which have no softmax normaliser for a z_loss.",
                hint="Leave it out.",
            )
    return RoutingObjective(context.model, [LOSSES[type(config)](config, context) for config in configs])
