"""Rules on the numbers themselves, and on their types."""

import functools
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor

from moestro.linting.checkpoint import Checkpoint
from moestro.linting.draft import Draft
from moestro.linting.rule import Rule, Trouble, counted, some
from moestro.linting.scan import computable_blocks
from moestro.models.weights import NewTensor, StoredTensor

KEPT_IN_FLOAT32 = ("e_score_correction_bias",)
COMPUTED = (torch.float32, torch.bfloat16, torch.float16)


def _not_finite(checkpoint: Checkpoint) -> Iterator[Trouble]:
    biases = [name for name in checkpoint.scan.not_finite if name.endswith(KEPT_IN_FLOAT32)]
    names = [name for name in checkpoint.scan.not_finite if name not in biases]
    if biases:
        choice = "Chooses by it: minus infinity keeps an expert from every token, NaN makes the choice arbitrary."
        yield Trouble(
            where=some(biases),
            what=f"{counted(len(biases), 'correction bias holds', 'correction biases hold')} NaN or infinity.",
            transformers=choice,
            vllm=choice,
            remedy="Go back to an earlier checkpoint; an expert that is not to be chosen can be taken out.",
        )
    if names:
        yield Trouble(
            where=some(names),
            what=f"{counted(len(names), 'tensor holds', 'tensors hold')} NaN or infinity.",
            transformers="Computes NaN.",
            vllm="Computes NaN, and answers noise without a word.",
            remedy="Go back to an earlier checkpoint.",
        )


NOT_FINITE = Rule(
    name="not-finite",
    severity="error",
    about="Weights, or biases of the choice of experts, that are NaN or infinite.",
    check=_not_finite,
    costly=True,
    any_architecture=True,
)


def _integers(checkpoint: Checkpoint) -> Iterator[Trouble]:
    names = [
        name
        for name, tensor in checkpoint.weights.items()
        if name in checkpoint.expected and (not tensor.dtype.is_floating_point or tensor.dtype.itemsize == 1)
    ]
    if names:
        yield Trouble(
            where=some(names),
            what=f"{counted(len(names), 'weight is', 'weights are')} {_kinds(checkpoint, names)}, and the config "
            "describes no quantisation.",
            transformers="Takes the stored numbers for the weights, unscaled.",
            vllm="Takes the stored numbers for the weights, unscaled.",
            remedy="Dequantise the checkpoint, or copy the quantisation_config that belongs to it.",
        )


def _kinds(checkpoint: Checkpoint, names: list[str]) -> str:
    return ", ".join(sorted({checkpoint.weights[name].code for name in names}))


UNSCALED_INTEGERS = Rule(
    name="unscaled-weights",
    severity="error",
    about="Weights stored as integers or 8-bit floats without a quantisation config.",
    check=_integers,
    any_architecture=True,
    structural=True,
)


def _doubles(checkpoint: Checkpoint) -> Iterator[Trouble]:
    names = [name for name, tensor in checkpoint.weights.items() if tensor.dtype == torch.float64]
    told = _told_type(checkpoint)
    if names or told == "float64":
        yield Trouble(
            where=("dtype", *some(names)),
            what=f"{counted(len(names), 'weight is', 'weights are')} stored in double precision; dtype is {told}.",
            transformers="Computes in what the config says.",
            vllm="Computes in half precision unless another type is asked for.",
            remedy="Store them in float32 or bfloat16.",
            affects=(),
            fixable=True,
        )


def _told_type(checkpoint: Checkpoint) -> str | None:
    told = checkpoint.parsed.get("dtype") or checkpoint.parsed.get("torch_dtype")
    return str(told) if told else None


def _single(checkpoint: Checkpoint, draft: Draft) -> None:
    if _told_type(checkpoint) == "float64":
        draft.config.pop("torch_dtype", None)
        draft.config["dtype"] = "float32"
    for name, tensor in draft.tensors.items():
        if tensor.dtype == torch.float64:
            draft.tensors[name] = NewTensor(torch.float32, tensor.shape, functools.partial(_cast, tensor))


def _cast(tensor: NewTensor) -> Iterator[Tensor]:
    parts = computable_blocks(tensor.source) if isinstance(tensor.source, StoredTensor) else tensor.source()
    for block in parts:
        yield block.float()


DOUBLE_PRECISION = Rule(
    name="double-precision",
    severity="warning",
    about="Weights in float64, which no engine serves.",
    check=_doubles,
    mend=_single,
    mends="float32.",
    any_architecture=True,
)


def _mixed(checkpoint: Checkpoint) -> Iterator[Trouble]:
    told = _told_type(checkpoint)
    stored = Counter(
        tensor.dtype
        for name, tensor in checkpoint.weights.items()
        if tensor.dtype in COMPUTED and not name.endswith(KEPT_IN_FLOAT32)
    )
    types = ", ".join(f"{count} in {str(dtype).removeprefix('torch.')}" for dtype, count in stored.most_common())
    others = [dtype for dtype in stored if str(dtype) != f"torch.{told}"]
    if told is not None and told != "float64" and others:
        yield Trouble(
            where=("dtype",),
            what=f"dtype is {told}, and tensors are stored {types}.",
            transformers=f"Casts all to {told}.",
            vllm=f"Casts all to {told}, unless another type is asked for.",
            remedy="Store all in one type and name it in the config.",
            affects=(),
        )
    if told is None:
        yield Trouble(
            where=("dtype",),
            what=f"The config names no dtype; tensors are stored {types}.",
            transformers="Takes the type of the first tensor.",
            vllm="Takes what the files say, float32 as bfloat16.",
            remedy="Name the type in the config.",
            affects=(),
        )


STORED_TYPES = Rule(
    name="stored-types",
    severity="warning",
    about="Tensors are stored in another type than the config's `dtype`, or it names none.",
    check=_mixed,
    any_architecture=True,
)
