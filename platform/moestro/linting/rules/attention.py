"""Rules on attention: biases, heads and norms that the two engines treat differently."""

from collections.abc import Iterator
from typing import Any

from moestro.linting.checkpoint import Checkpoint
from moestro.linting.draft import Draft
from moestro.linting.rule import Rule, Trouble, counted, some
from moestro.linting.scan import extremes
from moestro.models.weights import NewTensor

BIAS_FIELD = {"qwen2_moe": "qkv_bias"}
DROPPED_BIASES = {"olmoe": "qkvo", "granitemoe": "qkvo", "qwen3_moe": "o"}
"""Projections whose biases vLLM drops, by `model_type`."""
OWN_HEAD_SIZE = {"qwen2_moe", "olmoe", "granitemoe"}
"""Where vLLM takes hidden_size / num_attention_heads whatever `head_dim` is."""
CPU_HEAD_SIZES = (32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Those vLLM's CPU attention is built for."""
OLMOE_EPS = 1e-5
"""What vLLM takes whatever `rms_norm_eps` is."""


def head_size(config: Any) -> int:
    """Size of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _no_biases(checkpoint: Checkpoint) -> Iterator[Trouble]:
    if names := _absent_biases(checkpoint):
        field = BIAS_FIELD[checkpoint.model_type]
        yield Trouble(
            where=(field, *some(names)),
            what=f"{field} is {checkpoint.config.qkv_bias}, and biases of q, k, v are not stored: {len(names)}.",
            transformers="Computes without biases.",
            vllm="Always has biases and leaves them uninitialised without a word: NaN or noise.",
            remedy=f"Store biases of zeros and set {field} to true.",
            affects=("vllm",),
            fixable=True,
        )


def _absent_biases(checkpoint: Checkpoint) -> list[str]:
    if checkpoint.model_type not in BIAS_FIELD:
        return []
    names = _names(checkpoint, "qkv", "bias")
    return [name for name in names if name not in checkpoint.weights]


def _names(checkpoint: Checkpoint, projections: str, part: str) -> list[str]:
    layers = range(checkpoint.config.num_hidden_layers)
    return [f"model.layers.{layer}.self_attn.{name}_proj.{part}" for layer in layers for name in projections]


def _zero_biases(checkpoint: Checkpoint, draft: Draft) -> None:
    draft.config[BIAS_FIELD[checkpoint.model_type]] = True
    for name in _absent_biases(checkpoint):
        weight = draft.tensors.get(name.removesuffix("bias") + "weight")
        if weight:
            draft.tensors[name] = NewTensor.zeros(weight.shape[:1], weight.dtype)


MISSING_QKV_BIASES = Rule(
    name="missing-qkv-biases",
    severity="error",
    about="A Qwen2-MoE without biases of q, k and v, which vLLM always has.",
    check=_no_biases,
    mend=_zero_biases,
    mends="Biases of zeros, and `qkv_bias` is true.",
)


def _dropped(checkpoint: Checkpoint) -> Iterator[Trouble]:
    candidates = _names(checkpoint, DROPPED_BIASES.get(checkpoint.model_type, ""), "bias")
    stored = {
        name: checkpoint.weights[name]
        for name in candidates
        if name in checkpoint.expected.keys() & checkpoint.weights.keys()
    }
    if names := [name for name, tensor in stored.items() if any(extremes(tensor))]:
        yield Trouble(
            where=("attention_bias", *some(names)),
            what=f"{counted(len(names), 'bias of the attention is', 'biases of the attention are')} not zero.",
            transformers="Adds them.",
            vllm="Drops them without a word (measured: more than 1 nat).",
            remedy='Serve it with model_impl="transformers".',
            affects=("vllm",),
        )


DROPPED_ATTENTION_BIASES = Rule(
    name="dropped-attention-biases",
    severity="error",
    about="Biases of the attention that vLLM's class for the architecture does not have.",
    check=_dropped,
    costly=True,
)


def _heads(checkpoint: Checkpoint) -> Iterator[Trouble]:
    heads, shared = checkpoint.config.num_attention_heads, checkpoint.config.num_key_value_heads
    if heads % shared:
        yield Trouble(
            where=("num_attention_heads", "num_key_value_heads"),
            what=f"{heads} heads cannot share {shared} keys and values.",
            transformers="Raises an error at the first token.",
            vllm="Raises an error.",
            remedy="num_key_value_heads must divide num_attention_heads.",
        )


IMPOSSIBLE_HEADS = Rule(
    name="impossible-heads",
    severity="error",
    about="`num_key_value_heads` does not divide `num_attention_heads`.",
    check=_heads,
    of_quantised=True,
)


def _head_size(checkpoint: Checkpoint) -> Iterator[Trouble]:
    config = checkpoint.config
    own = config.hidden_size // config.num_attention_heads
    if checkpoint.model_type in OWN_HEAD_SIZE and head_size(config) != own:
        yield Trouble(
            where=("head_dim",),
            what=f"head_dim is {head_size(config)}, hidden_size / num_attention_heads is {own}.",
            transformers=f"Takes {head_size(config)}." if checkpoint.model_type != "olmoe" else "Raises an error.",
            vllm=f"Takes {own}, and a part of the weights without a word (measured: several nats).",
            remedy='Serve it with model_impl="transformers", or choose an architecture with free head sizes.',
            affects=("vllm",),
        )


IGNORED_HEAD_SIZE = Rule(
    name="ignored-head-size",
    severity="error",
    about="A `head_dim` that vLLM's class for the architecture does not look at.",
    check=_head_size,
    of_quantised=True,
)


def _cpu_head_size(checkpoint: Checkpoint) -> Iterator[Trouble]:
    size = head_size(checkpoint.config)
    if size not in CPU_HEAD_SIZES:
        yield Trouble(
            where=("head_dim",),
            what=f"Attention heads have {size} features.",
            transformers="Computes them.",
            vllm="Has no attention kernel for them on CPU and raises an error at the first token.",
            remedy=f"Fine on a GPU; on CPU take one of {', '.join(map(str, CPU_HEAD_SIZES))}.",
            affects=("vllm",),
        )


CPU_HEAD_SIZE = Rule(
    name="cpu-head-size",
    severity="warning",
    about="A head size that vLLM's CPU attention is not built for.",
    check=_cpu_head_size,
    of_quantised=True,
)


def _olmoe_norms(checkpoint: Checkpoint) -> Iterator[Trouble]:
    config = checkpoint.config
    if checkpoint.model_type != "olmoe" or (config.rms_norm_eps == OLMOE_EPS and config.clip_qkv is None):
        return
    yield Trouble(
        where=("rms_norm_eps", "clip_qkv"),
        what=f"rms_norm_eps is {config.rms_norm_eps}, clip_qkv is {config.clip_qkv}.",
        transformers="Does as the config says.",
        vllm=f"Takes {OLMOE_EPS} and clips nothing, whatever the config says.",
        remedy='Serve it with model_impl="transformers".',
        affects=("vllm",),
    )


OLMOE_ATTENTION = Rule(
    name="olmoe-attention",
    severity="error",
    about="An OLMoE with another `rms_norm_eps` than vLLM's fixed one, or with `clip_qkv`, which it does not do.",
    check=_olmoe_norms,
    of_quantised=True,
)
