"""Rules on rotary position embeddings."""

from collections.abc import Iterator
from typing import Any

from moestro.linting.checkpoint import Checkpoint
from moestro.linting.draft import ROPE_DICTIONARIES, Draft
from moestro.linting.rule import Rule, Trouble

FACTOR = "partial_rotary_factor"
THETA = "rope_theta"
MAY_BE_NULL = "attention_factor"
"""The option that vLLM computes where it is null, as transformers does."""


def _places(checkpoint: Checkpoint, field: str) -> dict[str, Any]:
    """Where config.json has `field`, and its value there."""
    parsed = checkpoint.parsed
    nested = {name: parsed[name] for name in ROPE_DICTIONARIES if isinstance(parsed.get(name), dict)}
    found = {f"{name}.{field}": content[field] for name, content in nested.items() if field in content}
    return found | ({field: parsed[field]} if field in parsed else {})


def _partial(checkpoint: Checkpoint) -> Iterator[Trouble]:
    factor = (checkpoint.config.rope_parameters or {}).get(FACTOR, 1.0)
    if checkpoint.model_type in {"glm4_moe", "flex_olmo"} or factor == 1.0:
        return
    yield Trouble(
        where=tuple(_places(checkpoint, FACTOR)),
        what=f"{FACTOR} is {factor}, and {checkpoint.model_type} rotates whole heads.",
        transformers="Rotates whole heads, or raises an error where positions are scaled too.",
        vllm=f"Rotates the part {factor} of every head (measured: several nats).",
        remedy="Remove the field.",
        affects=("vllm",),
        fixable=True,
    )


def _whole(_checkpoint: Checkpoint, draft: Draft) -> None:
    draft.drop_rope_field(FACTOR)


PARTIAL_ROTATION = Rule(
    name="partial-rotation",
    severity="error",
    about=f"`{FACTOR}` in an architecture that has no such thing in transformers and has it in vLLM.",
    check=_partial,
    mend=_whole,
    mends="The field is left out.",
    of_quantised=True,
)


def _default_part(checkpoint: Checkpoint) -> Iterator[Trouble]:
    if checkpoint.model_type == "glm4_moe" and not _places(checkpoint, FACTOR):
        yield Trouble(
            where=(FACTOR,),
            what=f"{FACTOR} is not given: half of every head is rotated, as in GLM-4.",
            transformers="Rotates half of every head.",
            vllm="Rotates half of every head.",
            remedy=f"Set {FACTOR} to 1.0 for what was a Llama or Qwen, to 0.5 for what was a GLM-4.",
        )


DEFAULT_ROTATION = Rule(
    name="default-rotation",
    severity="warning",
    about=f"A GLM-4 MoE that does not say `{FACTOR}`, whose default is 0.5.",
    check=_default_part,
    of_quantised=True,
)


def _theta(checkpoint: Checkpoint) -> Iterator[Trouble]:
    if not _places(checkpoint, THETA):
        taken = (checkpoint.config.rope_parameters or {}).get(THETA)
        yield Trouble(
            where=(THETA,),
            what=f"{THETA} is not given: {taken}, the default of {checkpoint.model_type}, is taken.",
            transformers=f"Takes {taken}.",
            vllm=f"Takes {taken}.",
            remedy="Give that of the model it was made from: defaults differ between architectures.",
        )


DEFAULT_THETA = Rule(
    name="default-theta",
    severity="warning",
    about=f"`{THETA}` is not given, and architectures have different defaults.",
    check=_theta,
    of_quantised=True,
)


def _contradiction(checkpoint: Checkpoint) -> Iterator[Trouble]:
    parsed, thetas = checkpoint.parsed, _places(checkpoint, THETA)
    both = all(isinstance(parsed.get(name), dict) for name in ROPE_DICTIONARIES)
    if not both and len(set(thetas.values())) < 2:
        return
    told = ", ".join(f"{name} = {value}" for name, value in thetas.items())
    taken = checkpoint.config.rope_parameters
    yield Trouble(
        where=(*thetas, *(ROPE_DICTIONARIES if both else ())),
        what=f"Positions are described twice: {told or 'rope_scaling hides rope_parameters'}.",
        transformers=f"Takes {taken}.",
        vllm=f"Takes {taken}.",
        remedy="Put everything into rope_parameters and remove rope_scaling and rope_theta.",
    )


TWO_ROTATIONS = Rule(
    name="two-rotations",
    severity="warning",
    about="Positions are described twice: `rope_scaling` beside `rope_parameters`, or two values of `rope_theta`.",
    check=_contradiction,
    of_quantised=True,
)


def _by_length(checkpoint: Checkpoint) -> Iterator[Trouble]:
    rope = checkpoint.config.rope_parameters or {}
    kind, longest = rope.get("rope_type"), checkpoint.config.max_position_embeddings
    original = rope.get("original_max_position_embeddings", longest)
    if kind == "longrope" and original < longest:
        yield Trouble(
            where=("rope_parameters",),
            what=f"longrope has two sets of factors, for up to {original} positions and for more.",
            transformers="Takes the long factors for sequences that are long.",
            vllm="Takes the long factors for all sequences, if it is started for long ones (measured: several nats).",
            remedy=f"Start vLLM with a max_model_len of {original} where sequences are short.",
            affects=("vllm",),
        )
    if kind == "dynamic":
        yield Trouble(
            where=("rope_parameters",),
            what=f"Positions are scaled dynamically beyond {longest}.",
            transformers=f"Raises the base with the length of the batch, once it exceeds {longest}.",
            vllm="Never raises the base.",
            remedy=f"Keep to {longest} positions, where both agree; or fix the scaling with another rope_type.",
            affects=("vllm",),
        )


ROTATION_BY_LENGTH = Rule(
    name="rotation-by-length",
    severity="warning",
    about="longrope, whose factors vLLM chooses once for all sequences, or dynamic scaling, which it does not do.",
    check=_by_length,
    of_quantised=True,
)


def _fields(checkpoint: Checkpoint) -> Iterator[Trouble]:
    rope = checkpoint.config.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    unread = [name for name, value in rope.items() if value is None and kind != "default" and name != MAY_BE_NULL]
    if kind == "linear" and isinstance(rope.get("factor"), int):
        unread.append("factor")
    if unread:
        yield Trouble(
            where=tuple(f"rope_parameters.{name}" for name in unread),
            what=f"Positions are scaled with {', '.join(f'{name} = {rope[name]}' for name in unread)}.",
            transformers="Takes null for absent, and whole numbers as they are.",
            vllm="Fails on null, and takes a whole factor of linear scaling for a list.",
            remedy="Leave out what is null, and write the factor with a decimal point.",
            affects=("vllm",),
            fixable=True,
        )


def _plain_fields(_checkpoint: Checkpoint, draft: Draft) -> None:
    for name in ROPE_DICTIONARIES:
        if isinstance(content := draft.config.get(name), dict):
            kept = {field: value for field, value in content.items() if value is not None}
            draft.config[name] = kept | ({"factor": float(kept["factor"])} if "factor" in kept else {})


ROTATION_FIELDS = Rule(
    name="rotation-fields",
    severity="error",
    about="Null options of a scaled rotary embedding, or a whole number as the factor of linear scaling: vLLM fails.",
    check=_fields,
    mend=_plain_fields,
    mends="Null is left out, the factor is a float.",
    of_quantised=True,
)
