"""Whether `tune` suits what `mix` makes: what would fail, or do nothing, only after all branches have trained."""

from moestro.config.mixing import MixConfig
from moestro.config.routing import BIASED
from moestro.config.stages import TuneConfig


def check_tuning(tune: TuneConfig, mix: MixConfig, *, origins: tuple[str, ...], domains: tuple[str, ...]) -> None:
    """Raise `ValueError`, the field's name first, unless the mix can be tuned so.

    `origins`: what each routed expert is made from; `domains`: those whose text it is tuned on.
    """
    _check_what_trains(tune, mix, origins)
    _check_losses(tune, mix)
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


def _listed(origins: tuple[str, ...]) -> str:
    return ", ".join(sorted(set(origins)))
