"""Which dense architectures can become a Mixture-of-Experts, and which one each becomes.

A dense model's feed-forward network is `down(act(gate x) * up x)`; its MoE has E of them per layer in one tensor
`gate_up_proj` [E, 2F, D] (gate above up) and `down_proj` [E, D, F]. All other weights keep their names.
D hidden, E experts, F intermediate.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import MixtralConfig, PreTrainedConfig, Qwen3MoeConfig

from moestro.errors import InputError

SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_dropout",
    "rope_parameters",
    "dtype",
)
"""Config fields that mean the same in a dense model and its MoE."""

_FEED_FORWARD = re.compile(r"model\.layers\.(\d+)\.mlp\.(gate_proj|up_proj|down_proj)\.weight")


@dataclass(frozen=True, kw_only=True)
class Family:
    """A dense architecture and the MoE architecture that holds its layers unchanged."""

    dense: str
    """`model_type` of the dense model."""
    moe: str
    """`model_type` of the MoE."""
    refuse: Callable[[Any], list[str]]
    """What in a dense config the MoE architecture cannot express, as `field = value, because` lines."""
    fields: Callable[[Any, int], dict[str, Any]]
    """Config fields of the MoE besides the shared ones, from the dense config and the number of experts."""
    config: type[PreTrainedConfig]
    """Config class of the MoE."""

    def moe_config(self, dense: Any, *, num_experts: int, num_experts_per_tok: int) -> PreTrainedConfig:
        """The MoE's config: that of `dense` with `num_experts` experts per layer, all layers sparse.

        Raises `InputError` naming every field of `dense` that the MoE architecture cannot express.
        """
        if problems := self.refuse(dense):
            raise InputError(
                f"A {self.dense} model with {'; '.join(problems)} cannot become a {self.moe}.",
                hint="Choose a checkpoint without it.",
            )
        shared = {name: getattr(dense, name) for name in SHARED_FIELDS if hasattr(dense, name)}
        return self.config(**shared, **self.fields(dense, num_experts), num_experts_per_tok=num_experts_per_tok)


def feed_forward_part(name: str) -> tuple[int, str] | None:
    """Layer and projection of a dense model's feed-forward weight, None for any other weight's name."""
    match = _FEED_FORWARD.fullmatch(name)
    return (int(match[1]), match[2]) if match else None


def family_of(config: Any) -> Family:
    """The family of a dense config; raises `InputError` naming what it is and what is supported."""
    if config.model_type in FAMILIES:
        return FAMILIES[config.model_type]
    raise InputError(
        f"No way is known to make experts of a {config.model_type!r} model.",
        hint=f"Supported dense architectures: {', '.join(FAMILIES)}.",
    )


def _refuse_any(config: Any) -> list[str]:
    biases = [f"{name} = true" for name in ("attention_bias", "mlp_bias") if getattr(config, name, False)]
    activation = [] if config.hidden_act == "silu" else [f"hidden_act = {config.hidden_act!r} (only silu is served)"]
    return biases + activation


def _refuse_qwen3(config: Any) -> list[str]:
    mixed = len(set(config.layer_types)) > 1
    return _refuse_any(config) + ([f"layer_types = {sorted(set(config.layer_types))} mixed"] if mixed else [])


def _mixtral_fields(dense: Any, num_experts: int) -> dict[str, Any]:
    return {"num_local_experts": num_experts, "sliding_window": getattr(dense, "sliding_window", None)}


def _qwen3_moe_fields(dense: Any, num_experts: int) -> dict[str, Any]:
    sliding = "sliding_attention" in dense.layer_types
    return {
        "num_experts": num_experts,
        "moe_intermediate_size": dense.intermediate_size,
        # Without it the gates of the chosen experts do not add up to one, and identical experts do not equal the FFN.
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
        "use_sliding_window": sliding,
        "sliding_window": dense.sliding_window if sliding else None,
    }


FAMILIES: dict[str, Family] = {
    "llama": Family(dense="llama", moe="mixtral", refuse=_refuse_any, fields=_mixtral_fields, config=MixtralConfig),
    "mistral": Family(dense="mistral", moe="mixtral", refuse=_refuse_any, fields=_mixtral_fields, config=MixtralConfig),
    "qwen3": Family(
        dense="qwen3", moe="qwen3_moe", refuse=_refuse_qwen3, fields=_qwen3_moe_fields, config=Qwen3MoeConfig
    ),
}
