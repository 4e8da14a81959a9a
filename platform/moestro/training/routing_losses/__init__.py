"""Losses and rules on routing: one per file, behind `RoutingLoss`, chosen by config from a literal registry."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from moestro.config import (
    BipBalance,
    DomainSupervision,
    ErcLoss,
    GlobalBatchLoss,
    LossFreeBalance,
    MutualInformationLoss,
    RandomPartition,
    RomaLoss,
    RoutingLossConfig,
    SwitchLoss,
    UncertainTokens,
    ZLoss,
)
from moestro.errors import ConfigError
from moestro.models.gating import GATINGS
from moestro.models.routers import routers
from moestro.training.routing_losses.balance import GlobalBatchBalance, SwitchBalance
from moestro.training.routing_losses.bip import BipBalancing
from moestro.training.routing_losses.domain_supervision import DomainRouting
from moestro.training.routing_losses.erc import ExpertRouterCoupling
from moestro.training.routing_losses.loss import Routing, RoutingLoss
from moestro.training.routing_losses.loss_free import LossFreeBalancing
from moestro.training.routing_losses.mutual_information import DenseTraining
from moestro.training.routing_losses.objective import RoutingObjective
from moestro.training.routing_losses.random_partition import RandomPartitionAveraging
from moestro.training.routing_losses.roma import RoutingAlignment
from moestro.training.routing_losses.uncertain_tokens import UncertainTokenBroadcast
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
    LossFreeBalance: lambda config, context: LossFreeBalancing(config, context.model),
    BipBalance: lambda config, context: BipBalancing(config, context.model),
    ErcLoss: lambda config, context: ExpertRouterCoupling(config, context.model),
    RomaLoss: lambda config, context: RoutingAlignment(config, context.model),
    MutualInformationLoss: lambda config, context: DenseTraining(config, context.model),
    UncertainTokens: lambda config, context: UncertainTokenBroadcast(config, context.model),
    RandomPartition: lambda config, context: RandomPartitionAveraging(config, context.model),
    DomainSupervision: lambda config, context: DomainRouting(config, context.model, context.origins, context.domains),
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
    losses = [LOSSES[type(config)](config, context) for config in configs]
    return RoutingObjective(context.model, losses, configs)
