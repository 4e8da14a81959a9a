"""Rules on names and shapes of tensors, against those of the model that transformers builds of the config."""

import math
from collections.abc import Iterator

from moestro.linting.checkpoint import HEAD, Checkpoint
from moestro.linting.draft import Draft
from moestro.linting.rule import Rule, Trouble, counted, some
from moestro.linting.rules.experts import of_uneven_experts
from moestro.linting.scan import extremes
from moestro.linting.spelling import transformers_reads, vllm_reads, vllm_refuses
from moestro.models.files import CONFIG

UNREAD_PARTS = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
"""Stored by old versions, passed over by both engines."""
QKV_BIASES = tuple(f".self_attn.{name}_proj.bias" for name in "qkv")
ATTENTION = ".self_attn."


def _misnamed(checkpoint: Checkpoint) -> Iterator[Trouble]:
    layout = checkpoint.own
    unread = [name for name in checkpoint.spelled if not vllm_reads(name, layout)]
    random = [name for name in checkpoint.spelled if not transformers_reads(name, layout)]
    if not unread and not random:
        return
    refuses = any(vllm_refuses(name, layout) for name in unread)
    failure = "Stops at names it does not know." if refuses else "Leaves the experts uninitialised without a word."
    random_numbers = "Fills the experts with random numbers and only warns."
    yield Trouble(
        where=some({*unread, *random}),
        what=f"Experts or routers are stored under names that are not those of {checkpoint.model_type}.",
        transformers=random_numbers if random else "Reads them.",
        vllm=failure if unread else "Reads them.",
        remedy=f"Store them as {next(iter(layout.experts.values()))} and {layout.router}.",
        affects=(*(("transformers",) if random else ()), *(("vllm",) if unread else ())),
        fixable=True,
    )


def _rename(_checkpoint: Checkpoint, _draft: Draft) -> None:
    """A draft has the layout's names from the start."""


EXPERT_NAMES = Rule(
    name="expert-names",
    severity="error",
    about="Experts or routers lie under names, or fused into tensors, that an engine does not read, as some versions "
    "of merging tools write them.",
    check=_misnamed,
    mend=_rename,
    mends="The names that transformers saves and vLLM reads, experts cut apart where they lie apart.",
    structural=True,
)


def _empty(checkpoint: Checkpoint) -> Iterator[Trouble]:
    names = [name for name, tensor in checkpoint.weights.items() if not tensor.length]
    if names and not (checkpoint.layout and checkpoint.layout.shared_counts_experts):
        yield Trouble(
            where=some(names),
            what=f"{counted(len(names), 'tensor has', 'tensors have')} no elements, as transformers saves a shared "
            "expert of width 0.",
            transformers="Computes nothing with them.",
            vllm="Raises an error: it builds no module for them.",
            remedy="Leave them out: transformers does not need them.",
            affects=("vllm",),
            fixable=True,
        )


def _drop_empty(_checkpoint: Checkpoint, draft: Draft) -> None:
    draft.tensors = {name: tensor for name, tensor in draft.tensors.items() if tensor.size}


EMPTY_TENSORS = Rule(
    name="empty-tensors",
    severity="error",
    about="Tensors without elements: shared experts of width 0.",
    check=_empty,
    mend=_drop_empty,
    mends="They are left out.",
    any_architecture=True,
)


def _missing(checkpoint: Checkpoint) -> Iterator[Trouble]:
    names = [
        name
        for name, shape in checkpoint.expected.items()
        if math.prod(shape)
        and name not in checkpoint.weights
        and name != HEAD
        and not (checkpoint.model_type == "qwen2_moe" and name.endswith(QKV_BIASES))
        and not name.endswith("e_score_correction_bias")
    ]
    if names:
        yield Trouble(
            where=some(names),
            what=f"{counted(len(names), 'tensor of the model is', 'tensors of the model are')} not stored.",
            transformers="Fills them with random numbers and only warns.",
            vllm="Leaves linear layers, experts and embeddings uninitialised without a word; raises for norms.",
            remedy=f"Copy the checkpoint again; or {CONFIG} is another model's.",
        )


MISSING_TENSORS = Rule(
    name="missing-tensors",
    severity="error",
    about="Tensors of the model are not stored.",
    check=_missing,
    any_architecture=True,
    structural=True,
)


def _shapes(checkpoint: Checkpoint) -> Iterator[Trouble]:
    uneven = of_uneven_experts(checkpoint) if checkpoint.layout else set()
    wrong: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
        name: (tensor.shape, checkpoint.expected[name])
        for name, tensor in checkpoint.weights.items()
        if name in checkpoint.expected and tensor.shape != checkpoint.expected[name] and name not in uneven
    }
    if wrong:
        shapes = [f"{name} is {list(stored)}, not {list(meant)}" for name, (stored, meant) in sorted(wrong.items())]
        yield Trouble(
            where=some(wrong),
            what=f"{counted(len(wrong), 'tensor has', 'tensors have')} another shape than {CONFIG} asks for: "
            f"{'; '.join(some(shapes))}.",
            transformers="Refuses to load them.",
            vllm="Raises an error, or takes a part of the tensor without a word.",
            remedy=f"{CONFIG} is another model's, or was edited: correct it.",
        )


SHAPES = Rule(
    name="shapes",
    severity="error",
    about="Tensors of another shape than the config asks for.",
    check=_shapes,
    any_architecture=True,
    structural=True,
)


def _unknown_names(checkpoint: Checkpoint) -> list[str]:
    """Tensors that neither engine asks for, but for those that both pass over. Whole layers have rules of their own."""
    behind = tuple(f"model.layers.{layer}." for layer in checkpoint.predicting_layers | checkpoint.layers_behind)
    return [
        name
        for name, tensor in checkpoint.weights.items()
        if name not in checkpoint.expected
        and tensor.length
        and name != HEAD
        and not name.startswith(behind)
        and not any(part in name for part in UNREAD_PARTS)
    ]


def _unread(checkpoint: Checkpoint) -> Iterator[Trouble]:
    names = [name for name in _unknown_names(checkpoint) if not name.endswith(".bias")]
    if names:
        yield Trouble(
            where=some(names),
            what=f"{counted(len(names), 'stored tensor is', 'stored tensors are')} none of the model's.",
            transformers="Passes over them with a warning.",
            vllm="Raises an error, or passes over them inside the experts.",
            remedy=f"Leave them out; or {CONFIG} has too few experts.",
            affects=("vllm",),
            fixable=True,
        )


def _drop_unread(checkpoint: Checkpoint, draft: Draft) -> None:
    for name in _unknown_names(checkpoint):
        if not name.endswith(".bias"):
            draft.tensors.pop(name, None)


UNREAD_TENSORS = Rule(
    name="unread-tensors",
    severity="error",
    about="Stored tensors that are none of the model's.",
    check=_unread,
    mend=_drop_unread,
    mends="They are left out.",
    any_architecture=True,
    structural=True,
)


def _unread_biases(checkpoint: Checkpoint) -> Iterator[Trouble]:
    candidates = [name for name in _unknown_names(checkpoint) if name.endswith(".bias")]
    names = [name for name in candidates if any(extremes(checkpoint.weights[name]))]
    if names:
        yield Trouble(
            where=some(names),
            what=f"{counted(len(names), 'stored bias is', 'stored biases are')} not zero, and {checkpoint.model_type} "
            "has none with this config.",
            transformers="Computes without them and only warns.",
            vllm="Computes without them without a word.",
            remedy="Set the config field that switches them on, or take an architecture that has them, as glm4_moe.",
        )


UNREAD_BIASES = Rule(
    name="unread-biases",
    severity="error",
    about="Stored biases that both engines drop.",
    check=_unread_biases,
    costly=True,
    any_architecture=True,
)
