"""The steer stage: a profile's experts and numbers, measured against the unsteered model, as steering.json."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from transformers import PreTrainedModel

from moestro.artifacts import Artifact, Job
from moestro.config import (
    AnyProfile,
    BoostProfile,
    ContrastProfile,
    DomainContrast,
    LanguageProfile,
    SuppressProfile,
)
from moestro.data.tokenizer import encode, load_tokenizer
from moestro.errors import InputError
from moestro.models.checkpoint import is_moe, load_model
from moestro.models.steering_profiles import Method, Profile, SteeredCheckpoint
from moestro.steering.gate import measure, require
from moestro.steering.reference import check_steerable, renormalises, router_shape
from moestro.steering.selection import Experts, domain_contrast, largest, preferred, prompt_contrast


def steer(config: AnyProfile, *, model: Artifact, tokens: Mapping[str, Artifact], job: Job) -> dict[str, Any]:
    """Write steering.json for `model`: which experts of which layers, found on the training tokens where the config
    asks for it, and what it costs on the held-out ones.

    Result: `experts` named, per layer; `loss_increase` per domain. Raises `GateError` with the figures if the profile
    costs more than its gate allows, `InputError` for a model that cannot be steered, experts it does not have, and
    domains that were not handed in.
    """
    if not is_moe(model.path):
        raise InputError(f"{model.path} is a dense model, it has no experts to steer.", hint="Mix it first.")
    network = load_model(model.path)
    check_steerable(network)
    job.reporter.progress(0, 2, "finding experts")
    profile = _profile(config, network, model, tokens)
    job.reporter.progress(1, 2, "measuring what it costs")
    figures = measure(network, profile, tokens, config.gate)
    require(figures, config.gate)
    gate = {"figures": figures, "thresholds": config.gate.model_dump(mode="json")}
    profile.model_copy(update={"gate": gate}).write(job.out)
    increase = {domain: found["loss_increase"] for domain, found in figures.items()}
    job.reporter.progress(2, 2, f"at most {max(increase.values()):+.4f} nats per token")
    return {
        "name": config.name,
        "method": config.method,
        "experts": {str(layer): list(named) for layer, named in enumerate(profile.layers) if named},
        "loss_increase": increase,
    }


def _profile(config: AnyProfile, network: PreTrainedModel, model: Artifact, tokens: Mapping[str, Artifact]) -> Profile:
    """Raises `InputError` where config and model do not fit."""
    layers, count, top_k = router_shape(network)
    try:
        return Profile(
            name=config.name,
            method=Method(config.method),
            checkpoint=SteeredCheckpoint(stage=model.stage, fingerprint=model.fingerprint),
            layers=_experts(config, network, model, tokens, (layers, count, top_k)),
            num_experts=count,
            top_k=top_k,
            renormalises=renormalises(network),
            parameters=_parameters(config),
        )
    except ValidationError as error:
        raise InputError(f"The profile does not fit the model: {error.errors()[0]['msg']}.") from None


def _parameters(config: AnyProfile) -> dict[str, float]:
    if isinstance(config, BoostProfile):
        return {"margin": config.margin}
    if isinstance(config, LanguageProfile):
        return {"strength": config.strength, "threshold": config.threshold}
    if isinstance(config, ContrastProfile):
        return {"alpha": config.alpha, "beta": config.beta, "weak_rank": config.weak_rank}
    return {}


def _experts(
    config: AnyProfile,
    network: PreTrainedModel,
    model: Artifact,
    tokens: Mapping[str, Artifact],
    shape: tuple[int, int, int],
) -> Experts:
    layers, count, top_k = shape
    if isinstance(config, ContrastProfile):
        return ((),) * layers
    if isinstance(config, LanguageProfile):
        delta_LE = domain_contrast(
            network,
            tokens,
            [config.target],
            config.generic,
            sequence_length=config.sequence_length,
            max_tokens=config.max_tokens,
        )
        return preferred(delta_LE, config)
    if config.select:
        most = top_k if isinstance(config, BoostProfile) else count
        return _selected(config, network, model, tokens, most)
    if beyond := [layer for layer in config.experts if layer >= layers]:
        raise InputError(f"experts: the model has no sparse layer {beyond[0]}, it has {layers}, counted from 0.")
    return tuple(config.experts.get(layer, ()) for layer in range(layers))


def _selected(
    config: SuppressProfile | BoostProfile,
    network: PreTrainedModel,
    model: Artifact,
    tokens: Mapping[str, Artifact],
    most: int,
) -> Experts:
    selection = config.select
    assert selection is not None
    if isinstance(selection, DomainContrast):
        delta_LE = domain_contrast(
            network,
            tokens,
            selection.target,
            selection.against,
            sequence_length=selection.sequence_length,
            max_tokens=selection.max_tokens,
        )
    else:
        tokenizer = load_tokenizer(model.path)
        target, against = (encode(tokenizer, list(prompts)) for prompts in (selection.target, selection.against))
        delta_LE = prompt_contrast(network, target, against)
    return largest(delta_LE, selection, most_per_layer=most)
