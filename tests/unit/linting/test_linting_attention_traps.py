"""Traps in attention, rotation, embeddings and head: each is caught by its rule, and mended where it can be."""

from collections.abc import Callable
from typing import Any

import pytest

Make = Callable[..., Any]


def longrope(make: Make) -> Any:
    factors = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
    return make("mixtral", head_dim=32).rope(rope_type="longrope", **factors, original_max_position_embeddings=32)


def null_option(make: Make) -> Any:
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
    return make("qwen3_moe").rope(**yarn, beta_fast=None)


MENDED: dict[str, tuple[str, Make]] = {
    "biases off": ("missing-qkv-biases", lambda make: make("qwen2_moe", qkv_bias=False)),
    "biases absent": ("missing-qkv-biases", lambda make: make("qwen2_moe").without(".bias")),
    "window in a Granite": ("sliding-windows", lambda make: make("granitemoe").set(sliding_window=8)),
    "window in a FlexOlmo": ("sliding-windows", lambda make: make("flex_olmo").set(sliding_window=8)),
    "window of nothing": ("sliding-windows", lambda make: make("mixtral").set(sliding_window=0)),
    "partial rotation": ("partial-rotation", lambda make: make("mixtral").rope(partial_rotary_factor=0.5)),
    "partial rotation beside": ("partial-rotation", lambda make: make("qwen3_moe").set(partial_rotary_factor=0.5)),
    "whole factor": ("rotation-fields", lambda make: make("mixtral").rope(rope_type="linear", factor=2)),
    "null option": ("rotation-fields", null_option),
    "vocabulary": ("vocabulary-size", lambda make: make("mixtral").set(vocab_size=400)),
    "tied GLM": ("tied-head", lambda make: make("glm4_moe").set(tie_word_embeddings=True).without("lm_head")),
    "tied OLMoE": ("tied-head", lambda make: make("olmoe", tie_word_embeddings=True)),
    "tied, other head": ("second-head", lambda make: make("mixtral").set(tie_word_embeddings=True)),
    "pad outside": ("pad-token", lambda make: make("flex_olmo").drop("pad_token_id")),
}
"""By the trap's name: the rule that catches it, and what makes a checkpoint with it."""
LEFT: dict[str, tuple[str, Make]] = {
    "biases of Granite": ("dropped-attention-biases", lambda make: make("granitemoe", attention_bias=True)),
    "biases of OLMoE": ("dropped-attention-biases", lambda make: make("olmoe", attention_bias=True)),
    "bias of Qwen3's output": ("dropped-attention-biases", lambda make: make("qwen3_moe", attention_bias=True)),
    "heads do not divide": (
        "impossible-heads",
        lambda make: make("mixtral", num_attention_heads=3, num_key_value_heads=2, head_dim=32),
    ),
    "head size": ("ignored-head-size", lambda make: make("granitemoe", head_dim=48)),
    "small heads": ("cpu-head-size", lambda make: make("mixtral", num_attention_heads=4)),
    "window in some layers": (
        "sliding-windows",
        lambda make: make("qwen2_moe").drop("layer_types").set(use_sliding_window=True, sliding_window=8),
    ),
    "norms of OLMoE": ("olmoe-attention", lambda make: make("olmoe").set(rms_norm_eps=1e-6)),
    "clipping of OLMoE": ("olmoe-attention", lambda make: make("olmoe").set(clip_qkv=1.0)),
    "rotation of GLM": (
        "default-rotation",
        lambda make: make("glm4_moe").drop("partial_rotary_factor").set(rope_parameters={"rope_theta": 1e4}),
    ),
    "theta not told": ("default-theta", lambda make: make("mixtral").drop("rope_parameters")),
    "theta twice": ("two-rotations", lambda make: make("mixtral").set(rope_theta=5e5)),
    "scaling hides parameters": (
        "two-rotations",
        lambda make: make("mixtral").set(rope_scaling={"rope_type": "linear", "factor": 2.0}),
    ),
    "longrope": ("rotation-by-length", longrope),
    "dynamic": ("rotation-by-length", lambda make: make("qwen3_moe").rope(rope_type="dynamic", factor=2.0)),
    "no head": ("missing-head", lambda make: make("mixtral").without("lm_head")),
    "no head in a GLM": ("missing-head", lambda make: make("glm4_moe").without("lm_head")),
}


@pytest.mark.parametrize("name", MENDED | LEFT)
def test_a_trap_is_caught_and_mended(name: str, make: Make, catch: Callable[..., None]) -> None:
    rule, trap = (MENDED | LEFT)[name]
    catch(rule, trap(make), mended=name in MENDED)
