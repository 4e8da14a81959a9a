"""The `tune` stage: the mixed model is trained on all domains, so that its router learns its experts."""

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedModel

from moestro.artifacts import Artifact, Job
from moestro.config import TuneConfig
from moestro.data.packed import Mixture, PackedTokens
from moestro.errors import InputError
from moestro.models.checkpoint import is_moe, load_model, save_model
from moestro.models.files import read_origins
from moestro.models.routers import is_expert_weight, is_router_weight, num_experts, routers
from moestro.training.frozen_experts import FrozenExperts
from moestro.training.learning_rates import RateFactors
from moestro.training.loop import train
from moestro.training.routing_losses import Context, routing_objective

TRAINABLE: dict[str, Callable[[str], bool]] = {
    "all": lambda _: True,
    "router": is_router_weight,
    "experts": is_expert_weight,
    "non_experts": lambda name: not is_expert_weight(name),
}
"""Which parameters train, by `tune.trainable`."""


def tune(config: TuneConfig, *, model: Artifact, tokens: Mapping[str, Artifact], job: Job) -> dict[str, Any]:
    """Train the MoE, or a part of it, with losses on its routing; write the checkpoint into `job.out`.

    Result: the training's figures, and load_balancing_loss and max_violation of the last step.
    Raises `InputError` for a dense model, `ConfigError` for a loss that the model's routers cannot take, for experts to
    freeze that it has not, and if nothing is left to train.
    """
    if not is_moe(model.path):
        raise InputError(f"{model.path} is a dense model, it has no router to tune.", hint="Tune the result of `mix`.")
    training = config.training
    mixture = tune_mixture(config, tokens)
    network, origins = load_model(model.path, tokenizer=True), read_origins(model.path)
    objective = routing_objective(config.losses, Context(network, origins, tuple(mixture.domains)))
    result = train(
        network,
        mixture,
        training,
        job=job,
        trainable=TRAINABLE[config.trainable],
        auxiliary=objective,
        factors=RateFactors.of(config.rates, token_share(network, config)),
        frozen=FrozenExperts(network, origins, config.frozen_experts) if config.frozen_experts else None,
        held_out=_held_out(tokens) if training.early_stopping else None,
    )
    save_model(network, job.out, tokenizer_from=model.path, origins=origins)
    return result.figures("load_balancing_loss", "max_violation")


def tune_mixture(config: TuneConfig, tokens: Mapping[str, Artifact]) -> Mixture:
    """What the MoE is tuned on: all domains alike. Raises `InputError` if one does not fill a sequence."""
    domains = {name: PackedTokens.open(artifact.path, "train") for name, artifact in tokens.items()}
    return Mixture(domains, config.training.sequence_length, config.training.seed)


def _held_out(tokens: Mapping[str, Artifact]) -> dict[str, PackedTokens]:
    return {name: PackedTokens.open(artifact.path, "held_out") for name, artifact in tokens.items()}


def token_share(model: PreTrainedModel, config: TuneConfig) -> float:
    """The share of the tokens that a routed expert sees while it is tuned, where experts are loaded alike."""
    total = num_experts(model)
    chosen = {"mutual_information": total, "random_partition": 1}
    per_token = next((chosen[loss.type] for loss in config.losses if loss.type in chosen), None)
    return (per_token or int(routers(model)[0].top_k)) / total  # type: ignore[arg-type]
