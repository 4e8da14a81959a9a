"""The mix stage: feed-forward networks of the branches become experts, everything else their mean.

Experts stand in the order of the branches; with `include_seed` the seed's own feed-forward networks follow as the
last, the generalist. D hidden, E experts, F intermediate, L layers.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from moestro.artifacts import Artifact, Job
from moestro.config import MixConfig
from moestro.data.packed import PackedTokens
from moestro.errors import InputError
from moestro.mixing.compare import check_same_kind
from moestro.mixing.router_init import centroid_routers, random_routers
from moestro.models.checkpoint import load_model, save_model, stored_dtype
from moestro.models.families import family_of, feed_forward_part
from moestro.models.routers import experts, parameter_counts, routers
from moestro.models.windows import spread_windows

GENERALIST = "seed"
WINDOW = 256
"""Tokens per calibration window."""


def mix(
    config: MixConfig, *, seed: Artifact, branches: Mapping[str, Artifact], tokens: Mapping[str, Artifact], job: Job
) -> dict[str, Any]:
    """Mix `branches` (by domain) of `seed` into one MoE checkpoint in `job.out`, in the type the seed is stored in.

    Each expert's weights are a branch's, bit for bit. All others are the mean over the branches (and the seed when
    it is included), taken in float64, so that weights on which all agree stay as they are. `tokens` (by domain) are
    read for `centroid` routers alone. Result: parameters, active_parameters, experts, size_bytes, router_init.
    Raises `InputError` if seed and branches are not of one kind, or their architecture cannot become an MoE.
    """
    names = _expert_names(config, branches, tokens)
    dense_config = check_same_kind(seed.path, {name: branch.path for name, branch in branches.items()})
    moe_config = family_of(dense_config).moe_config(
        dense_config, num_experts=len(names), num_experts_per_tok=config.num_experts_per_tok
    )
    model = AutoModelForCausalLM.from_config(moe_config, dtype=stored_dtype(seed.path))
    members = {**branches, **({GENERALIST: seed} if config.include_seed else {})}
    steps = len(members) + 2
    mean = _Mean()
    for position, (name, member) in enumerate(members.items()):
        job.reporter.progress(position, steps, f"expert {name}")
        dense = load_model(member.path, dtype=model.dtype)
        _fill_experts(model, position, dense)
        mean.add(dict(_shared_weights(dense)))
    job.reporter.progress(len(members), steps, f"routers: {config.router_init}")
    _fill_rest(model, mean.values(), _router_weights(config, model, names, seed, tokens))
    job.reporter.progress(len(members) + 1, steps, "saving")
    save_model(model, job.out, tokenizer_from=seed.path, origins=[names] * model.config.num_hidden_layers)
    job.reporter.progress(steps, steps, "mixed")
    return {
        **parameter_counts(model),
        "experts": names,
        "num_experts_per_tok": config.num_experts_per_tok,
        "router_init": config.router_init,
        "size_bytes": sum(path.stat().st_size for path in job.out.glob("*.safetensors")),
    }


def _expert_names(config: MixConfig, branches: Mapping[str, Artifact], tokens: Mapping[str, Artifact]) -> list[str]:
    """What each expert is made from, in order; raises `InputError` if the inputs do not fit together."""
    if not branches:
        raise InputError("There is no branch to mix.", hint="Configure at least one domain.")
    if config.include_seed and GENERALIST in branches:
        raise InputError(f"A branch is called {GENERALIST!r}, like the generalist.", hint="Rename that domain.")
    names = [*branches, *([GENERALIST] if config.include_seed else [])]
    if config.num_experts_per_tok > len(names):
        raise InputError(
            f"mix.num_experts_per_tok is {config.num_experts_per_tok}, but there are only {len(names)} experts.",
            hint="Lower it, add domains, or set mix.include_seed.",
        )
    missing = [name for name in branches if name not in tokens]
    if config.router_init == "centroid" and missing:
        raise InputError(f"No tokens of {', '.join(missing)} to take centroids from.", hint="Hand in their tokens.")
    return names


class _Mean:
    """The mean of weights that come one model after the other, accumulated in float64."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            value = weight.double()
            self._sums[name] = self._sums[name].add_(value) if name in self._sums else value.clone()
        self._count += 1

    def values(self) -> dict[str, Tensor]:
        return {name: total / self._count for name, total in self._sums.items()}


def _shared_weights(dense: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Every weight outside the feed-forward networks, tied ones once."""
    return ((name, weight.detach()) for name, weight in dense.named_parameters() if not feed_forward_part(name))


@torch.no_grad()
def _fill_experts(model: PreTrainedModel, expert: int, dense: PreTrainedModel) -> None:
    """Make the feed-forward networks of `dense` expert number `expert` of every layer."""
    blocks: list[Any] = list(experts(model))
    for name, weight in dense.named_parameters():
        if part := feed_forward_part(name):
            layer, projection = part
            gate_FD, up_FD = blocks[layer].gate_up_proj[expert].chunk(2)
            target = {"gate_proj": gate_FD, "up_proj": up_FD, "down_proj": blocks[layer].down_proj[expert]}[projection]
            target.copy_(weight)


@torch.no_grad()
def _fill_rest(model: PreTrainedModel, shared: Mapping[str, Tensor], routers_LED: Tensor) -> None:
    """Set every other weight of `model`; a name that exists on one side only is an error of the family's layout."""
    expected = {name for name, _ in model.named_parameters() if ".mlp." not in name}
    if expected != set(shared):
        raise RuntimeError(f"dense and MoE layouts disagree on {sorted(expected ^ set(shared))[:3]}")
    for name, weight in model.named_parameters():
        if name in shared:
            weight.copy_(shared[name])
    for router, rows_ED in zip(routers(model), routers_LED, strict=True):
        router.get_parameter("weight").copy_(rows_ED)


def _router_weights(
    config: MixConfig, model: PreTrainedModel, names: list[str], seed: Artifact, tokens: Mapping[str, Artifact]
) -> Tensor:
    """First router weights [L, E, D] as the config asks for."""
    layers, hidden = model.config.num_hidden_layers, model.config.hidden_size
    if config.router_init == "zero":
        return torch.zeros(layers, len(names), hidden)
    if config.router_init == "random":
        return random_routers(layers, len(names), hidden, std=config.router_std, seed=config.seed)
    windows = {
        name: spread_windows(
            PackedTokens.open(tokens[name].path, "train").ids,
            length=min(WINDOW, model.config.max_position_embeddings),
            max_tokens=config.calibration_tokens,
        )
        for name in names
        if name != GENERALIST or not config.include_seed
    }
    return centroid_routers(load_model(seed.path), windows, names)
