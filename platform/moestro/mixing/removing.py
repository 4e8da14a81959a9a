"""The remove stage: experts are taken out of a Mixture-of-Experts with their router rows, tensor by tensor.

Experts that stay keep their order and every byte, as does all else. Every layer keeps as many, because transformers
and vLLM serve only that. Experts of one group stay in it: each group loses as many.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moestro.artifacts import Artifact, Job
from moestro.config import RemoveConfig
from moestro.errors import InputError
from moestro.linting import refuse_errors, refuse_faulty
from moestro.mixing.existing import UNKNOWN, ExistingMoe

GROUP_SCORE_EXPERTS = 2
"""A group is judged by its two best experts, so it must have them."""


def remove(config: RemoveConfig, *, model: Artifact, job: Job) -> dict[str, Any]:
    """Write `model` without the experts that `config` names to `job.out`.

    Result: removed (names or numbers as given), experts (what is left, per layer), expert_ids (per layer the new number
    of each old one, null for those taken out), num_experts, num_experts_per_tok, dropped_layers (numbers of the layers
    behind the last one, left out), parameters, active_parameters, size_bytes.
    Raises `InputError` if an expert is not there, fewer than are chosen per token would remain, or layers or groups
    would lose different numbers.
    """
    moe = ExistingMoe.open(model.path)
    known = refuse_faulty(model.path)
    removed = _removed(config, moe)
    kept = {
        layer: [expert for expert in range(moe.num_experts) if expert not in gone] for layer, gone in removed.items()
    }
    _check_remains(moe, kept)
    origins = [[names[expert] for expert in kept[layer]] for layer, names in zip(moe.layers, moe.origins, strict=True)]
    tensors = moe.changed(kept)
    moe.write(job, tensors, origins, max_shard_bytes=config.max_shard_bytes)
    refuse_errors(job.out, but=known)
    num_experts = len(origins[0])
    return {
        "removed": _named(config),
        "experts": origins,
        "expert_ids": [_new_ids(kept[layer], moe.num_experts) for layer in moe.layers],
        "num_experts": num_experts,
        "num_experts_per_tok": moe.num_experts_per_tok,
        "dropped_layers": list(moe.draft_layers),
        **moe.parameter_counts(tensors, num_experts),
        "size_bytes": sum(path.stat().st_size for path in job.out.glob("*.safetensors")),
    }


def _new_ids(kept: Sequence[int], count: int) -> list[int | None]:
    return [kept.index(expert) if expert in kept else None for expert in range(count)]


def _named(config: RemoveConfig) -> list[str]:
    by_layer = [f"layer {layer}: {expert}" for layer, experts in config.layers.items() for expert in experts]
    return [*(str(expert) for expert in config.experts), *by_layer]


def _removed(config: RemoveConfig, moe: ExistingMoe) -> dict[int, set[int]]:
    """Numbers of the experts to take out, by layer; raises `InputError` that lists all that are not there."""
    origins = dict(zip(moe.layers, moe.origins, strict=True))
    missing = [f"layer {layer}" for layer in config.layers if layer not in origins]
    everywhere: Mapping[int | str, dict[int, set[int]]] = {
        expert: {layer: _meant(expert, names) for layer, names in origins.items()} for expert in config.experts
    }
    missing += [_shown(expert) for expert, found in everywhere.items() if not any(found.values())]
    removed = {layer: set().union(*(found[layer] for found in everywhere.values())) for layer in origins}
    for layer, experts in config.layers.items():
        found = {expert: _meant(expert, origins.get(layer, ())) for expert in experts}
        missing += [f"{_shown(expert)} in layer {layer}" for expert, meant in found.items() if not meant]
        if layer in removed:
            removed[layer] |= set().union(*found.values())
    if missing:
        raise InputError(
            f"{moe.folder} has no {', no '.join(missing)}.",
            hint=f"Layers {_ranges(moe.layers)} have experts 0 to {moe.num_experts - 1}{_named_ones(moe)}.",
        )
    return removed


def _meant(expert: int | str, names: Sequence[str]) -> set[int]:
    if isinstance(expert, int):
        return {expert} & set(range(len(names)))
    return {number for number, name in enumerate(names) if name == expert}


def _shown(expert: int | str) -> str:
    return f"expert {expert}" if isinstance(expert, int) else f"expert made from {expert!r}"


def _ranges(layers: Sequence[int]) -> str:
    whole = list(layers) == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]} to {layers[-1]}" if whole else ", ".join(map(str, layers))


def _named_ones(moe: ExistingMoe) -> str:
    names = dict.fromkeys(name for layer in moe.origins for name in layer if name != UNKNOWN)
    return f", made from {', '.join(names)}" if names else "; no experts.json says what they were made from"


def _check_remains(moe: ExistingMoe, kept: Mapping[int, Sequence[int]]) -> None:
    counts = {len(experts) for experts in kept.values()}
    if len(counts) > 1:
        shown = ", ".join(f"{len(experts)} in layer {layer}" for layer, experts in kept.items())
        raise InputError(
            f"Layers would keep different numbers of experts: {shown}.",
            hint="transformers and vLLM serve one number alone: take as many out of every layer.",
        )
    (count,) = counts
    if count < moe.num_experts_per_tok:
        raise InputError(
            f"{count} of {moe.num_experts} experts would remain, and every token chooses {moe.num_experts_per_tok}.",
            hint="Leave more. Experts of one name go together: name single ones by number.",
        )
    for layer, experts in kept.items():
        for problem in _group_problems(moe, experts):
            raise InputError(
                f"{problem} in layer {layer}.",
                hint="Take as many experts out of every group, and leave each at least two.",
            )


def _group_problems(moe: ExistingMoe, kept: Sequence[int]) -> Iterator[str]:
    """What is wrong with the groups once only `kept` remain; they are as many as before, one after the other."""
    if moe.layout.correction_bias is None:
        return
    size = moe.num_experts // moe.num_groups
    sizes = [sum(expert // size == group for expert in kept) for group in range(moe.num_groups)]
    if len(set(sizes)) > 1:
        yield f"Groups of experts would keep different numbers ({', '.join(map(str, sizes))})"
    elif sizes[0] < GROUP_SCORE_EXPERTS:
        yield f"Groups would keep {sizes[0]} experts, and a group is judged by its {GROUP_SCORE_EXPERTS} best"
    elif sizes[0] * int(getattr(moe.config, "topk_group", None) or 1) < moe.num_experts_per_tok:
        yield (
            f"The {moe.config.topk_group} groups that a token chooses would hold fewer than the "
            f"{moe.num_experts_per_tok} experts it chooses"
        )
