"""Which experts a profile acts on, by what they are chosen for.

An expert's activation in a text is the share of the text's tokens that choose it, and its contrast the mean activation
over the texts of one class less that over the other's:

    delta = mean over target texts of a / length - mean over the others of a / length

with a the tokens of a text that choose the expert (arXiv 2510.04694, eq. 3). fTRI (arXiv 2502.11096) sums a over a
prompt without dividing; on windows of one length both rank alike, and on prompts of several lengths the sum would
rank the length. L sparse layers, E experts, N windows of S tokens.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moestro.artifacts import Artifact
from moestro.config import DomainContrast, LanguageProfile, PromptContrast
from moestro.data.packed import PackedTokens
from moestro.errors import InputError
from moestro.models.routers import num_experts
from moestro.models.routing import record_routes
from moestro.models.windows import forward_windows, spread_windows

Experts = tuple[tuple[int, ...], ...]
"""Per sparse layer, experts in order."""


def activations(model: PreTrainedModel, windows_NS: Tensor) -> Tensor:
    """Share of the tokens of `windows_NS` that choose each expert, [L, E] float64."""
    counts_LE = torch.zeros(0)
    with record_routes(model) as record:
        for _ in forward_windows(model, windows_NS):
            chosen = [torch.bincount(ids_TK.flatten(), minlength=num_experts(model)).cpu() for ids_TK in record.ids]
            found_LE = torch.stack(chosen).double()
            counts_LE = counts_LE + found_LE if counts_LE.numel() else found_LE
    return counts_LE / windows_NS.numel()


def domain_contrast(
    model: PreTrainedModel,
    tokens: Mapping[str, Artifact],
    target: Sequence[str],
    against: Sequence[str],
    *,
    sequence_length: int,
    max_tokens: int,
) -> Tensor:
    """Contrast [L, E] between the training tokens of domains; `against` none means all others.

    Raises `InputError` for domains that were not handed in, or if there is nothing to set the targets off from.
    """
    others = list(against) or [name for name in tokens if name not in target]
    if missing := [name for name in (*target, *others) if name not in tokens]:
        raise InputError(
            f"There are no tokens of domain {missing[0]!r}.", hint=f"Hand them in; there are {', '.join(tokens)}."
        )
    if not others:
        raise InputError(
            "There is no domain to set the targets off from.", hint="Hand in the tokens of one more domain."
        )
    length = min(sequence_length, model.config.max_position_embeddings)

    def mean(names: Iterable[str]) -> Tensor:
        found = []
        for name in names:
            ids = PackedTokens.open(tokens[name].path, "train").ids
            found.append(activations(model, spread_windows(ids, length=length, max_tokens=max_tokens)))
        return torch.stack(found).mean(dim=0)

    return mean(target) - mean(others)


def prompt_contrast(model: PreTrainedModel, target: list[list[int]], against: list[list[int]]) -> Tensor:
    """Contrast [L, E] between prompts, as token ids. Raises `InputError` for one longer than the model reads."""
    longest = max(len(prompt) for prompt in (*target, *against))
    if longest > model.config.max_position_embeddings:
        raise InputError(
            f"A prompt has {longest} tokens, the model reads {model.config.max_position_embeddings}.",
            hint="Shorten it.",
        )

    def mean(prompts: list[list[int]]) -> Tensor:
        return torch.stack([activations(model, torch.tensor([prompt])) for prompt in prompts]).mean(dim=0)

    return mean(target) - mean(against)


def largest(delta_LE: Tensor, config: DomainContrast | PromptContrast, *, most_per_layer: int) -> Experts:
    """The `config.count` experts of the largest contrast above 0 over all layers; fewer if there are no more.

    Of a layer at most `most_per_layer` are taken. Raises `InputError` if none has a contrast above 0.
    """
    layers: list[list[int]] = [[] for _ in delta_LE]
    count = 0
    for place in delta_LE.flatten().argsort(descending=True, stable=True).tolist():
        layer, expert = divmod(place, delta_LE.shape[1])
        if count == config.count or not delta_LE[layer, expert] > 0:
            break
        if len(layers[layer]) < most_per_layer:
            layers[layer].append(expert)
            count += 1
    if not count:
        raise InputError(
            "No expert is chosen more often by the target than by the others.", hint="Contrast other texts."
        )
    return tuple(tuple(sorted(experts)) for experts in layers)


def preferred(delta_LE: Tensor, config: LanguageProfile) -> Experts:
    """In each middle layer, the experts whose contrast is above the threshold.

    Raises `InputError` if there is none, with the largest contrast that was found.
    """
    layers = len(delta_LE)
    middle = range(math.floor(config.begin * layers), math.ceil(config.end * layers))
    found = tuple(
        tuple((delta_LE[layer] > config.threshold).nonzero()[:, 0].tolist()) if layer in middle else ()
        for layer in range(layers)
    )
    if not any(found):
        most = float(delta_LE[middle.start : middle.stop].max())
        raise InputError(
            f"No expert of layers {middle.start} to {middle.stop - 1} prefers {config.target} by more than "
            f"{config.threshold:g}; the largest contrast is {most:.3g}.",
            hint="Lower `threshold`.",
        )
    return found
