"""The config of `tune`, and whether it suits what `mix` makes: what would otherwise fail, or do nothing, only after all
branches have trained."""

from typing import Literal

from pydantic import model_validator

from moestro.config.base import Config
from moestro.config.mixing import MixConfig
from moestro.config.routing import BIASED, REROUTING, GlobalBatchLoss, ParameterRates, RomaLoss, RoutingLossConfig
from moestro.config.training import TrainingConfig

TRAINED = {
    "all": ("experts", "shared_experts", "routers", "others"),
    "router": ("routers",),
    "experts": ("experts",),
    "non_experts": ("shared_experts", "routers", "others"),
}
"""Groups of parameters, as `rates` names them, that train by `tune.trainable`."""


class TuneConfig(Config):
    """Fine-tune the mixed model on all domains."""

    training: TrainingConfig
    """The training run."""
    trainable: Literal["all", "router", "experts", "non_experts"] = "all"
    """Which weights train."""
    frozen_experts: tuple[str, ...] = ()
    """Origins (domains, `seed`) of experts that stay as they are."""
    rates: ParameterRates = ParameterRates()
    """Factors of the learning rate by group of parameters."""
    losses: tuple[RoutingLossConfig, ...] = (GlobalBatchLoss(),)
    """What is added to the cross entropy; none: `[]`."""

    @model_validator(mode="after")
    def _losses_go_together(self) -> "TuneConfig":
        types = [loss.type for loss in self.losses]
        if repeated := sorted({name for name in types if types.count(name) > 1}):
            raise ValueError(f"losses: {repeated[0]} is there twice")
        rerouting = [name for name in types if name in REROUTING]
        if len(rerouting) > 1:
            raise ValueError(f"losses: {' and '.join(rerouting)} both decide which experts a token takes; keep one")
        if all(name in types for name in BIASED):
            raise ValueError(f"losses: {' and '.join(BIASED)} both move the correction bias; keep one")
        return self

    @model_validator(mode="after")
    def _something_trains(self) -> "TuneConfig":
        if not self.trained():
            idle = ", ".join(TRAINED[self.trainable])
            raise ValueError(
                f"rates: trainable is {self.trainable}, and the factor of {idle} is 0: nothing would train; "
                "raise a factor, or choose another trainable"
            )
        return self

    @model_validator(mode="after")
    def _losses_have_what_they_act_on(self) -> "TuneConfig":
        trained = self.trained()
        for loss in self.losses:
            if loss.type == "random_partition" and "experts" not in trained:
                raise ValueError(
                    "losses: random_partition averages what the experts learn, so the experts have to train"
                )
            if loss.type in BIASED and "routers" not in trained:
                raise ValueError(
                    f"losses: {loss.type} moves the routers' correction bias, so the routers have to train: choose "
                    "another `trainable` than experts and `rates.routers` above 0, or leave it out"
                )
            if loss.type == "roma":
                self._neighbours_are_there(loss)
        return self

    def _neighbours_are_there(self, loss: RomaLoss) -> None:
        """A sequence that is predicted well needs `neighbours` others in the better half, hence twice as many."""
        training, needed = self.training, 2 * loss.neighbours + 1
        if (sequences := training.batch_size // training.accumulation) < needed:
            raise ValueError(
                f"losses: roma looks for {loss.neighbours} neighbours in the better half of a micro-batch, which takes "
                f"{needed} sequences; batch_size {training.batch_size} by accumulation {training.accumulation} makes "
                f"{sequences}: raise batch_size, or lower accumulation or roma's `neighbours`"
            )

    def trained(self) -> tuple[str, ...]:
        """The groups of parameters, as `rates` names them, that train."""
        return tuple(group for group in TRAINED[self.trainable] if getattr(self.rates, group) != 0)


def check_tuning(tune: TuneConfig, mix: MixConfig, *, origins: tuple[str, ...], domains: tuple[str, ...]) -> None:
    """Raise `ValueError`, the field's name first, unless the mix can be tuned so.

    `origins`: what each routed expert is made from; `domains`: those whose text it is tuned on.
    """
    _check_what_trains(tune, mix, origins)
    _check_losses(tune, mix)
    _check_averaging(tune, len(origins))
    if any(loss.type == "domain_supervision" for loss in tune.losses) and not set(origins) & set(domains):
        raise ValueError(
            "losses: domain_supervision draws a domain's tokens to the domain's own expert, and the mix has none: its "
            f"experts come from {_listed(origins)}; leave it out, or make experts of branches (mix.experts)"
        )


def _check_what_trains(tune: TuneConfig, mix: MixConfig, origins: tuple[str, ...]) -> None:
    if unknown := sorted(set(tune.frozen_experts) - set(origins)):
        raise ValueError(
            f"frozen_experts: no expert comes from {unknown[0]!r}; there are experts from {_listed(origins)}"
        )
    trained, all_frozen = set(tune.trained()), set(origins) <= set(tune.frozen_experts)
    if all_frozen and any(loss.type == "random_partition" for loss in tune.losses):
        raise ValueError(
            "frozen_experts: random_partition averages what the experts learn, and all of them are frozen; "
            "leave one of them out, or random_partition"
        )
    if mix.generalist != "shared":
        trained.discard("shared_experts")
    if not trained:
        raise ValueError(
            "rates: only shared_experts has a factor above 0, and the mix has no shared expert: nothing would train; "
            "raise another factor, or set mix.generalist to shared"
        )
    if all_frozen and trained == {"experts"}:
        raise ValueError(
            "frozen_experts: all experts are frozen, and nothing else trains; leave one of them out, or let more "
            "train (trainable, rates)"
        )


def _check_losses(tune: TuneConfig, mix: MixConfig) -> None:
    biased = mix.selection == "loss_free"
    for loss in tune.losses:
        if loss.type == "z_loss" and biased:
            raise ValueError("losses: mix.selection is loss_free, whose sigmoids have no normaliser for a z_loss")
        if loss.type in BIASED and not biased:
            raise ValueError(f"losses: {loss.type} moves a correction bias, which takes mix.selection: loss_free")
        if loss.type == "bip" and mix.num_groups_per_tok < mix.num_groups:
            raise ValueError(
                "losses: bip balances over all experts, mix.num_groups_per_tok leaves some out; "
                "take loss_free, which heeds groups"
            )


def _check_averaging(tune: TuneConfig, experts: int) -> None:
    for loss in tune.losses:
        if loss.type == "random_partition" and loss.share * experts > experts - 1:
            raise ValueError(
                f"losses: random_partition's share of {loss.share:g} draws {experts} experts beyond their mean, where "
                f"{experts - 1}/{experts} makes them the same; lower it, 0.1 is the default"
            )


def _listed(origins: tuple[str, ...]) -> str:
    return ", ".join(sorted(set(origins)))
