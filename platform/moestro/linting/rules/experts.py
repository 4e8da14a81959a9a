"""Rules on the experts themselves: how many, how wide, and whether they compute anything.

E experts, F intermediate.
"""

import functools
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from moestro.errors import InputError
from moestro.linting.checkpoint import Checkpoint
from moestro.linting.draft import Draft
from moestro.linting.rule import Rule, Trouble, counted, some
from moestro.models.blocks import same_bytes
from moestro.models.files import ORIGINS, read_json
from moestro.models.layouts import EXPERT_COUNTS, PROJECTIONS
from moestro.models.weights import NewTensor, StoredTensor

COMPARED_ROWS = 256
"""Features by which two experts are compared."""


def _count(checkpoint: Checkpoint) -> Iterator[Trouble]:
    fields, stored = _count_fields(checkpoint), checkpoint.experts.num_experts
    told = {field: checkpoint.parsed.get(field) for field in fields}
    shown = " and ".join(f"{field} is {value}" for field, value in told.items())
    if len(set(told.values())) > 1:
        yield Trouble(
            where=fields,
            what=f"{shown}, and {stored or 'an unclear number of'} experts are stored.",
            transformers="Goes by one of them, and refuses to load tensors of another shape.",
            vllm="Goes by one of them, and raises an error or leaves what is missing uninitialised.",
            remedy="Set all to what is stored.",
            fixable=stored is not None,
        )
    elif stored and getattr(checkpoint.config, checkpoint.own.num_experts) != stored:
        yield _size(fields, f"{shown}, and {stored} experts with {stored} router rows are stored in every layer.")


def _count_fields(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The fields of config.json that hold the number of experts: versions of transformers write different ones."""
    return tuple(name for name in EXPERT_COUNTS if checkpoint.parsed.get(name) is not None)


def _size(fields: tuple[str, ...], what: str) -> Trouble:
    return Trouble(
        where=fields,
        what=what,
        transformers="Refuses to load tensors of another shape.",
        vllm="Raises an error, or leaves what is missing uninitialised.",
        remedy=f"Set {' and '.join(fields)} to what is stored.",
        fixable=True,
    )


def _tell_count(checkpoint: Checkpoint, draft: Draft) -> None:
    for field in _count_fields(checkpoint):
        draft.config[field] = checkpoint.num_experts


EXPERT_COUNT = Rule(
    name="expert-count",
    severity="error",
    about="The config has another number of experts than is stored, or two numbers.",
    check=_count,
    mend=_tell_count,
    mends="The number that is stored.",
    structural=True,
)


def _width(checkpoint: Checkpoint) -> Iterator[Trouble]:
    layout, widths = checkpoint.own, checkpoint.experts.widths
    field = layout.expert_width
    told = getattr(checkpoint.config, field)
    if len(widths) == 1 and widths != {told} and not layout.shared_counts_experts:
        stored = next(iter(widths))
        yield _size((field,), f"{field} is {told}, and all stored experts are {stored} wide.")


def _tell_width(checkpoint: Checkpoint, draft: Draft) -> None:
    draft.config[checkpoint.own.expert_width] = max(checkpoint.experts.widths)


EXPERT_WIDTH = Rule(
    name="expert-width",
    severity="error",
    about="The config has another width of experts than is stored.",
    check=_width,
    mend=_tell_width,
    mends="The width that is stored.",
    structural=True,
)


def of_uneven_experts(checkpoint: Checkpoint) -> set[str]:
    """Tensors of experts narrower than the widest, where zeros can make up for it."""
    return {name for expert in _narrow(checkpoint) for name in expert}


def _narrow(checkpoint: Checkpoint) -> Iterator[dict[str, tuple[str, StoredTensor]]]:
    """The narrower experts that are whole: by tensor its projection and what is stored."""
    layout, widths = checkpoint.own, checkpoint.experts.widths
    if len(widths) < 2 or (layout.shared_counts_experts and max(widths) != checkpoint.config.moe_intermediate_size):
        return
    for layer, number in itertools.product(checkpoint.sparse_layers, range(checkpoint.num_experts)):
        expert = checkpoint.expert(layer, number)
        if len(expert) != len(PROJECTIONS) or any(len(tensor.shape) != 2 for tensor in expert.values()):
            continue
        width, hidden = expert["gate_proj"].shape
        whole = expert["up_proj"].shape == (width, hidden) and expert["down_proj"].shape == (hidden, width)
        if whole and width < max(widths):
            names = {part: layout.experts[part].format(layer=layer, expert=number) for part in PROJECTIONS}
            yield {names[part]: (part, tensor) for part, tensor in expert.items()}


def _uneven(checkpoint: Checkpoint) -> Iterator[Trouble]:
    if names := of_uneven_experts(checkpoint):
        yield Trouble(
            where=some(names),
            what=f"Experts differ in width: {', '.join(map(str, sorted(checkpoint.experts.widths)))}.",
            transformers="Cannot put them together and refuses to load.",
            vllm="Leaves the rest of the narrower ones uninitialised without a word.",
            remedy="Pad the narrower ones with features of zero weights, which change nothing.",
            fixable=True,
        )


def _pad(checkpoint: Checkpoint, draft: Draft) -> None:
    widest = max(checkpoint.experts.widths)
    for expert in _narrow(checkpoint):
        for name, (part, tensor) in expert.items():
            axis = 1 if part == "down_proj" else 0
            shape = (tensor.shape[0], widest) if axis else (widest, tensor.shape[1])
            draft.tensors[name] = NewTensor(tensor.dtype, shape, functools.partial(_padded, tensor, shape))
    draft.config[checkpoint.own.expert_width] = widest


def _padded(stored: StoredTensor, shape: tuple[int, ...]) -> Iterator[Tensor]:
    padded = torch.zeros(shape, dtype=stored.dtype)
    padded[: stored.shape[0], : stored.shape[1]] = stored.read()
    yield padded


UNEVEN_EXPERTS = Rule(
    name="uneven-experts",
    severity="error",
    about="Experts differ in width.",
    check=_uneven,
    mend=_pad,
    mends="Narrower experts get features of zero weights: they compute what they did.",
    structural=True,
)


def _silent(checkpoint: Checkpoint) -> Iterator[Trouble]:
    silent = [
        f"layer {layer}, expert {number}"
        for layer, number in itertools.product(checkpoint.sparse_layers, range(checkpoint.num_experts))
        if _computes_zero(checkpoint, layer, number)
    ]
    if silent:
        yield Trouble(
            where=some(silent),
            what=f"{counted(len(silent), 'expert adds', 'experts add')} nothing to any token: a projection is zero.",
            transformers="Computes zeros.",
            vllm="Computes zeros.",
            remedy="If they are not to be trained from there, take them out.",
        )


def _computes_zero(checkpoint: Checkpoint, layer: int, number: int) -> bool:
    if not checkpoint.own.fused:
        names = (name.format(layer=layer, expert=number) for name in checkpoint.own.experts.values())
        return any(name in checkpoint.scan.zero for name in names)
    return any(
        _has_zero_part(part, checkpoint.weights[name].rows(number, number + 1)[0])
        for part, template in checkpoint.own.experts.items()
        if (name := template.format(layer=layer)) in checkpoint.weights
    )


def _has_zero_part(part: str, entry: Tensor) -> bool:
    """Whether one expert's projection is zero; of gate above up, whether either is."""
    halves = entry.chunk(2) if part == "gate_up_proj" else (entry,)
    return any(not half.any() for half in halves)


ZERO_EXPERTS = Rule(
    name="zero-experts",
    severity="warning",
    about="Experts whose output is zero for every token.",
    check=_silent,
    costly=True,
)


def first_experts_differ_by(checkpoint: Checkpoint) -> float | None:
    """How far apart the first two experts are: 0 for copies, near 1 for networks trained apart.

    One minus the cosine of their gate projections in the first sparse layer; None if there are no two.
    """
    pairs = [checkpoint.expert(layer, number) for layer in checkpoint.sparse_layers[:1] for number in (0, 1)]
    if len(pairs) < 2 or any("gate_proj" not in expert for expert in pairs):
        return None
    one, other = (expert["gate_proj"] for expert in pairs)
    if one.shape != other.shape:
        return None
    if same_bytes(one, other):
        return 0.0
    first, second = (tensor.rows(0, min(COMPARED_ROWS, tensor.shape[0])).double().flatten() for tensor in (one, other))
    return float(1 - torch.nn.functional.cosine_similarity(first, second, dim=0))


def _origins(checkpoint: Checkpoint) -> Iterator[Trouble]:
    if not checkpoint.has_origins:
        return
    try:
        content = read_json(checkpoint.folder / ORIGINS)
    except InputError as error:
        content, what = None, error.message
    rows = content.get("origins") if isinstance(content, dict) else None
    if isinstance(rows, list):
        counts = [len(row) if isinstance(row, list) else 0 for row in rows]
        layers, experts = len(checkpoint.sparse_layers), checkpoint.num_experts
        if counts == [experts] * layers:
            return
        what = f"{ORIGINS} tells of {counts} experts per layer, and there are {layers} layers of {experts}."
    elif content is not None:
        what = f"{ORIGINS} holds no list `origins`."
    yield Trouble(
        where=(ORIGINS,),
        what=what,
        transformers="Does not read it.",
        vllm="Does not read it.",
        remedy="Correct it, or remove it: Moestro names experts after it.",
        affects=(),
    )


ORIGINS_MISMATCH = Rule(
    name="origins-mismatch",
    severity="warning",
    about="`experts.json` tells of other layers or experts than there are.",
    check=_origins,
)
