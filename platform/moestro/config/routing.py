"""Configs of what tuning adds to the cross entropy: losses on routing, and rules that act on it, one class each."""

from typing import Annotated, Literal

from pydantic import Field

from moestro.config.base import Config
from moestro.config.seeds import Seed


class SwitchLoss(Config):
    """Load balance within each micro-batch (GShard, arXiv 2006.16668; Switch, 2101.03961)."""

    type: Literal["switch"] = "switch"
    coefficient: float = Field(0.01, gt=0)
    """Weight of the loss."""


class GlobalBatchLoss(Config):
    """Load balance over the whole batch of a step, all micro-batches and workers (arXiv 2501.11873)."""

    type: Literal["global_batch"] = "global_batch"
    coefficient: float = Field(0.01, gt=0)
    """Weight of the loss."""


class ZLoss(Config):
    """Keeps router logits small (ST-MoE, arXiv 2202.08906)."""

    type: Literal["z_loss"] = "z_loss"
    coefficient: float = Field(1e-3, gt=0)
    """Weight of the loss."""


class LossFreeBalance(Config):
    """Moves the router's correction bias by the sign of each expert's deficit (arXiv 2408.15664). Adds no loss; needs
    a model mixed with `selection: loss_free`."""

    type: Literal["loss_free"] = "loss_free"
    update_rate: float = Field(1e-3, gt=0, le=1)
    """How far a step moves the bias, which is added to scores between 0 and 1."""


class BipBalance(Config):
    """Solves for the correction bias that balances each batch before it is routed (BIP, arXiv 2502.15451). Adds no
    loss; needs a model mixed with `selection: loss_free`."""

    type: Literal["bip"] = "bip"
    iterations: int = Field(8, ge=1)
    """Alternating steps of the dual per micro-batch and layer."""


class ErcLoss(Config):
    """Couples each router row with its own expert, by weights alone (ERC, arXiv 2512.23447)."""

    type: Literal["erc"] = "erc"
    coefficient: float = Field(1.0, gt=0)
    """Weight of the loss."""
    alpha: float = Field(1.0, ge=0, le=1)
    """Share of what a row makes of its own expert that it may make of others; smaller is stricter."""
    seed: Seed = 0
    """Seeds the noise on the rows."""


class RomaLoss(Config):
    """Like sequences take like routes: routing of a sequence is drawn to that of its neighbours among those that the
    model predicts well (RoMA, arXiv 2511.07419)."""

    type: Literal["roma"] = "roma"
    coefficient: float = Field(0.1, gt=0)
    """Weight of the loss."""
    layers: int = Field(5, ge=1)
    """How many of the last sparse layers it acts on."""
    neighbours: int = Field(3, ge=1)
    """Neighbours of each sequence, found in its micro-batch, which needs twice as many sequences and one more."""
    bandwidth: float = Field(0.4, ge=1e-3, le=1e3)
    """Width of the Gaussian over distances of embeddings, which have length one. At the least only the nearest counts,
    at the most all neighbours alike."""


class MutualInformationLoss(Config):
    """Trains densely, every token through all experts, with routing balanced overall and decided per token (DS-MoE,
    arXiv 2404.05567); the result is served sparse."""

    type: Literal["mutual_information"] = "mutual_information"
    coefficient: float = Field(0.01, gt=0)
    """Weight of the loss."""


class UncertainTokens(Config):
    """Tokens whose routing is undecided train all experts (GW-MoE, arXiv 2406.12375). Adds no loss."""

    type: Literal["uncertain_tokens"] = "uncertain_tokens"
    threshold: float = Field(0.9, gt=0, le=1)
    """Entropy of a token's routing, as a share of its largest possible value, from which it is undecided."""


class RandomPartition(Config):
    """Tokens are dealt to experts at random and the experts drawn together after every step (Experts Weights
    Averaging, arXiv 2308.06093). Adds no loss."""

    type: Literal["random_partition"] = "random_partition"
    share: float = Field(0.1, gt=0, le=1)
    """How far a step draws each expert to the mean of the others, at its end; rises linearly from 0. At most
    (E - 1) / E for E experts, which makes them the same."""
    seed: Seed = 0
    """Seeds the partition."""


class DomainSupervision(Config):
    """Draws the tokens of a domain to the domain's own expert (NeKo, arXiv 2411.05945)."""

    type: Literal["domain_supervision"] = "domain_supervision"
    coefficient: float = Field(0.1, gt=0)
    """Weight of the loss at the first step."""
    final_coefficient: float = Field(0.0, ge=0)
    """Weight at the last step; linear in between."""


RoutingLossConfig = Annotated[
    SwitchLoss
    | GlobalBatchLoss
    | ZLoss
    | LossFreeBalance
    | BipBalance
    | ErcLoss
    | RomaLoss
    | MutualInformationLoss
    | UncertainTokens
    | RandomPartition
    | DomainSupervision,
    Field(discriminator="type"),
]

REROUTING = ("bip", "mutual_information", "uncertain_tokens", "random_partition")
"""Types that decide themselves which experts a token takes while training; only one of them can."""
BIASED = ("loss_free", "bip")
"""Types that move a correction bias: they need routers with one, and only one of them can."""


class ParameterRates(Config):
    """Factors of the learning rate by group of parameters. A group whose factor is 0 does not train."""

    experts: Annotated[float, Field(ge=0)] | Literal["auto"] = 1.0
    """Routed experts. `auto`: by the share of the tokens that an expert sees (Hunyuan-Large, arXiv 2411.02265)."""
    shared_experts: float = Field(1.0, ge=0)
    """Shared experts."""
    routers: float = Field(1.0, ge=0)
    """Routers, and gates of shared experts."""
    others: float = Field(1.0, ge=0)
    """Everything else."""
