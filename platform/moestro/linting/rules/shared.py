"""Rules on shared experts: where the engines disagree on whether there is one."""

from collections.abc import Iterator

from moestro.linting.checkpoint import EMBEDDING, Checkpoint
from moestro.linting.draft import Draft
from moestro.linting.rule import Rule, Trouble
from moestro.models.weights import NewTensor


def _foreign_shared(checkpoint: Checkpoint) -> Iterator[Trouble]:
    width = checkpoint.parsed.get("shared_expert_intermediate_size")
    if checkpoint.model_type == "qwen3_moe" and width:
        yield Trouble(
            where=("shared_expert_intermediate_size",),
            what="A Qwen3-MoE has no shared expert.",
            transformers="Has none and passes over the field.",
            vllm="Builds one and leaves it uninitialised without a word.",
            remedy="Remove the field; a shared expert needs glm4_moe or qwen2_moe.",
            affects=("vllm",),
            fixable=True,
        )


def _no_foreign_shared(_checkpoint: Checkpoint, draft: Draft) -> None:
    draft.config.pop("shared_expert_intermediate_size", None)


FOREIGN_SHARED_EXPERT = Rule(
    name="foreign-shared-expert",
    severity="error",
    about="A Qwen3-MoE whose config has the width of a shared expert.",
    check=_foreign_shared,
    mend=_no_foreign_shared,
    mends="The field is left out.",
    of_quantised=True,
)


def _no_shared(checkpoint: Checkpoint) -> Iterator[Trouble]:
    layout = checkpoint.own
    if layout.shared_counts_experts and not getattr(checkpoint.config, str(layout.shared_width)):
        yield Trouble(
            where=(str(layout.shared_width),),
            what="There is to be no shared expert.",
            transformers="Computes one without features: zeros.",
            vllm="Divides by zero: the whole process ends (measured on CPU).",
            remedy="Store one shared expert of zeros.",
            affects=("vllm",),
            fixable=EMBEDDING in checkpoint.weights,
        )


def _zero_shared(checkpoint: Checkpoint, draft: Draft) -> None:
    layout = checkpoint.own
    assert layout.shared is not None
    draft.config[str(layout.shared_width)] = 1
    width = int(getattr(checkpoint.config, layout.expert_width))
    hidden = int(checkpoint.config.hidden_size)
    dtype = checkpoint.weights[EMBEDDING].dtype
    for layer in checkpoint.sparse_layers:
        for part, name in layout.shared.items():
            shape = (hidden, width) if part == "down_proj" else (width, hidden)
            draft.tensors[name.format(layer=layer)] = NewTensor.zeros(shape, dtype)


NO_SHARED_EXPERT = Rule(
    name="no-shared-expert",
    severity="error",
    about="A GLM-4 MoE without a shared expert.",
    check=_no_shared,
    mend=_zero_shared,
    mends="One shared expert of zeros.",
)
