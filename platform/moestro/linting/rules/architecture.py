"""Rules on what the checkpoint says it is."""

from collections.abc import Iterator

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moestro.linting.checkpoint import Checkpoint, refused
from moestro.linting.draft import Draft
from moestro.linting.rule import Rule, Trouble
from moestro.models.files import CONFIG
from moestro.models.layouts import LAYOUTS, routed_experts

WORKS = "Compare config.json with that of a checkpoint that works."


def _unusable(checkpoint: Checkpoint) -> Iterator[Trouble]:
    if error := refused(lambda: routed_experts(checkpoint.parsed)) or refused(lambda: checkpoint.expected):
        yield Trouble(
            where=(CONFIG,),
            what=error.message,
            transformers="Cannot build the model.",
            vllm="Cannot build the model: it reads the config through transformers.",
            remedy=error.hint or WORKS,
        )
        return
    chosen = getattr(checkpoint.text, "num_experts_per_tok", 1)
    if checkpoint.layout and not (isinstance(chosen, int) and chosen > 0):
        yield Trouble(
            where=("num_experts_per_tok",),
            what=f"num_experts_per_tok is {chosen}.",
            transformers="Raises an error at the first token.",
            vllm="Raises an error.",
            remedy=WORKS,
        )


UNUSABLE_CONFIG = Rule(
    name="unusable-config",
    severity="error",
    about="transformers cannot build a model of config.json.",
    check=_unusable,
    any_architecture=True,
    final=True,
    structural=True,
    of_quantised=True,
)


def _unknown(checkpoint: Checkpoint) -> Iterator[Trouble]:
    if checkpoint.layout is None:
        yield Trouble(
            where=("model_type",),
            what=f"The layout of model_type {checkpoint.model_type!r} is not known here: only "
            f"{'files' if checkpoint.quantised else 'files, names, shapes, numbers'} and tokenizer were checked.",
            transformers="Not known.",
            vllm="Not known.",
            remedy=f"Known: {', '.join(LAYOUTS)}.",
            affects=(),
        )


UNKNOWN_ARCHITECTURE = Rule(
    name="unknown-architecture",
    severity="warning",
    about="An architecture whose layout and traps are not known here; few rules were run.",
    check=_unknown,
    any_architecture=True,
    of_quantised=True,
)


def _quantised(checkpoint: Checkpoint) -> Iterator[Trouble]:
    if checkpoint.quantised:
        yield Trouble(
            where=(CONFIG,),
            what="The weights are described as quantised: their names, shapes and numbers were not checked.",
            transformers="Not checked.",
            vllm="Not checked.",
            remedy="Check the checkpoint that it was quantised from.",
            affects=(),
        )


QUANTISED = Rule(
    name="quantised",
    severity="warning",
    about="The config describes quantised weights: only files, config and tokenizer were checked.",
    check=_quantised,
    any_architecture=True,
    of_quantised=True,
)


def _architectures(checkpoint: Checkpoint) -> Iterator[Trouble]:
    own = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[checkpoint.model_type]
    found = checkpoint.parsed.get("architectures")
    if found != [own]:
        yield Trouble(
            where=("architectures",),
            what=f"architectures is {found}, where {checkpoint.model_type} has [{own!r}].",
            transformers="Goes by model_type and is right.",
            vllm="Goes by architectures: builds another class, which does not know the weights, or none.",
            remedy=f'Set "architectures": ["{own}"].',
            affects=("vllm",),
            fixable=True,
        )


def _name_architecture(checkpoint: Checkpoint, draft: Draft) -> None:
    draft.config["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[checkpoint.model_type]]


ARCHITECTURES = Rule(
    name="architectures",
    severity="error",
    about="`architectures` is missing or does not belong to `model_type`.",
    check=_architectures,
    mend=_name_architecture,
    mends="The class that belongs to `model_type`.",
    of_quantised=True,
)


def _activation(checkpoint: Checkpoint) -> Iterator[Trouble]:
    activation = checkpoint.config.hidden_act
    if activation not in {"silu", "swish"}:
        yield Trouble(
            where=("hidden_act",),
            what=f"Experts use {activation!r}.",
            transformers=f"Computes {activation!r}.",
            vllm="Computes SiLU in the experts without a word; some classes refuse.",
            remedy="Serve it with transformers.",
            affects=("vllm",),
        )


ACTIVATION = Rule(
    name="activation",
    severity="error",
    about="`hidden_act` is another one than SiLU, the only one vLLM computes in experts.",
    check=_activation,
    of_quantised=True,
)
