"""Traps in tensors, layers, experts and routing: each is caught by its rule, and mended where it can be."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moestro.linting import lint

Make = Callable[..., Any]
BIAS = "model.layers.0.self_attn.q_proj.bias"
CORRECTION = "e_score_correction_bias"


def fused_like_memory(make: Make) -> Any:
    """Mixtral's experts as transformers holds them in memory, and as some merging tools write them."""

    def change(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = {name: weight for name, weight in weights.items() if "block_sparse_moe" not in name}
        for layer in range(2):
            sparse, dense = f"model.layers.{layer}.block_sparse_moe", f"model.layers.{layer}.mlp"
            parts = [
                [weights[f"{sparse}.experts.{expert}.{name}.weight"] for name in ("w1", "w3", "w2")]
                for expert in range(4)
            ]
            kept[f"{dense}.gate.weight"] = weights[f"{sparse}.gate.weight"]
            kept[f"{dense}.experts.gate_up_proj"] = torch.stack([torch.cat(three[:2]) for three in parts])
            kept[f"{dense}.experts.down_proj"] = torch.stack([three[2] for three in parts])
        return kept

    return make("mixtral").change(change)


def transposed_gate(make: Make) -> Any:
    def change(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: weight.T.contiguous() if ".gate." in name else weight for name, weight in weights.items()}

    return make("qwen3_moe").change(change)


def predicting(make: Make, count: int) -> Any:
    """A layer behind the last one with `count` experts, as GLM-4.5 keeps the one that predicts a further token."""

    def change(weights: dict[str, Tensor]) -> None:
        for name in list(weights):
            expert = name.partition(".experts.")[2].partition(".")[0]
            if name.startswith("model.layers.1.") and (not expert or int(expert) < count):
                rows = weights[name][:count] if ".gate." in name else weights[name]
                weights[name.replace("layers.1.", "layers.2.")] = rows
        weights["model.layers.2.eh_proj.weight"] = torch.ones(64, 128)

    return make("glm4_moe").change(change).set(num_nextn_predict_layers=1)


def copied_experts(make: Make, kind: str) -> Any:
    def change(weights: dict[str, Tensor]) -> None:
        for name in weights:
            for expert in "123":
                if f".experts.{expert}." in name:
                    weights[name] = weights[name.replace(f".experts.{expert}.", ".experts.0.")]

    return make(kind).change(change).set(norm_topk_prob=False)


def related_experts(make: Make) -> Any:
    def change(weights: dict[str, Tensor]) -> None:
        for name, weight in weights.items():
            if ".experts.1." in name:
                weights[name] = weights[name.replace(".experts.1.", ".experts.0.")] + weight * 0.1

    return make("qwen2_moe").change(change).set(norm_topk_prob=False)


def silent_gate(make: Make) -> Any:
    """Of one of Granite's experts, which lie in one tensor, gate above up."""

    def change(weights: dict[str, Tensor]) -> None:
        for name, weight in weights.items():
            if "input_linear" in name:
                weight[1, :24] = 0

    return make("granitemoe").change(change)


def wrong_origins(make: Make) -> Any:
    trap = make("mixtral")
    (trap.path / "experts.json").write_text(json.dumps({"origins": [["code", "prose"]] * 2}))
    return trap


MENDED: dict[str, tuple[str, Make]] = {
    "fused as in memory": ("expert-names", fused_like_memory),
    "router elsewhere": ("expert-names", lambda make: make("mixtral").rename("block_sparse_moe.gate", "mlp.gate")),
    "projections by Llama's names": ("expert-names", lambda make: make("mixtral").rename(".w1.", ".gate_proj.")),
    "projections by Mixtral's names": (
        "expert-names",
        lambda make: make("qwen3_moe").rename("experts.0.gate_proj", "experts.0.w1"),
    ),
    "count": ("expert-count", lambda make: make("mixtral").set(num_local_experts=6)),
    "count of a fused layout": ("expert-count", lambda make: make("granitemoe").set(num_local_experts=3)),
    "count twice": ("expert-count", lambda make: make("mixtral").set(num_experts=3)),
    "count beside": ("expert-count", lambda make: make("qwen2_moe").set(num_local_experts=3)),
    "width": ("expert-width", lambda make: make("qwen3_moe").set(moe_intermediate_size=32)),
    "uneven": ("uneven-experts", lambda make: make("mixtral").narrow(".0.block_sparse_moe.experts.1.")),
    "layer too few": ("layer-count", lambda make: make("mixtral").set(num_hidden_layers=1)),
    "layer too few, by kind": (
        "layer-count",
        lambda make: make("qwen3_moe").set(num_hidden_layers=1, layer_types=["full_attention"]),
    ),
    "layers below none": ("layer-count", lambda make: make("mixtral").set(num_hidden_layers=-1)),
    "layer taken for a predicting one": (
        "layer-count",
        lambda make: make("glm4_moe").set(num_hidden_layers=1, num_nextn_predict_layers=1),
    ),
    "foreign tensor": ("unread-tensors", lambda make: make("mixtral").add("model.extra.weight", torch.ones(3))),
    "empty shared expert": ("empty-tensors", lambda make: make("qwen2_moe", shared_expert_intermediate_size=0)),
    "no shared expert": ("no-shared-expert", lambda make: make("glm4_moe", n_shared_experts=0)),
    "shared expert of Qwen3": (
        "foreign-shared-expert",
        lambda make: make("qwen3_moe").set(shared_expert_intermediate_size=16),
    ),
    "copies": ("unnormalised-copies", lambda make: copied_experts(make, "qwen3_moe")),
    "copies by default": ("unnormalised-copies", lambda make: copied_experts(make, "flex_olmo").drop("norm_topk_prob")),
    "no correction bias": ("missing-correction-bias", lambda make: make("glm4_moe").without(CORRECTION)),
}
"""By the trap's name: the rule that catches it, and what makes a checkpoint with it."""
LEFT: dict[str, tuple[str, Make]] = {
    "gate transposed": ("shapes", transposed_gate),
    "shape": ("shapes", lambda make: make("mixtral").set(num_key_value_heads=2)),
    "expert missing": (
        "missing-tensors",
        lambda make: make("mixtral").without("layers.1.block_sparse_moe.experts.2.w1"),
    ),
    "layer too many": ("missing-tensors", lambda make: make("mixtral").set(num_hidden_layers=3)),
    "layers with a gap": (
        "layer-count",
        lambda make: make("mixtral", num_hidden_layers=3).rename("layers.2.", "layers.3.").set(num_hidden_layers=2),
    ),
    "layer behind is not whole": (
        "layer-count",
        lambda make: make("mixtral").without("layers.1.self_attn.q_proj").set(num_hidden_layers=1),
    ),
    "predicting layer": ("predicting-layers", lambda make: predicting(make, 3)),
    "foreign bias": ("unread-biases", lambda make: make("mixtral").add(BIAS, torch.ones(64))),
    "OLMoE renormalised": ("ignored-renormalisation", lambda make: make("olmoe").set(norm_topk_prob=True)),
    "related": ("unnormalised-gates", related_experts),
    "gates not told": ("unnormalised-gates", lambda make: make("qwen3_moe").drop("norm_topk_prob")),
    "too many chosen": ("impossible-choice", lambda make: make("mixtral").set(num_experts_per_tok=5)),
    "groups of one": ("impossible-choice", lambda make: make("glm4_moe").set(n_group=4)),
    "groups do not divide": ("impossible-choice", lambda make: make("glm4_moe").set(n_group=3)),
    "small groups": (
        "small-groups",
        lambda make: make("glm4_moe").set(n_group=2, topk_group=1, num_experts_per_tok=3),
    ),
    "zero router": ("unreachable-experts", lambda make: make("mixtral").fill("gate.weight", 0.0)),
    "bias of minus infinity": ("not-finite", lambda make: make("glm4_moe").fill(CORRECTION, -torch.inf, 1)),
    "bias too low": ("unreachable-experts", lambda make: make("glm4_moe").fill(CORRECTION, -1.5, 1)),
    "correction bias is NaN": ("not-finite", lambda make: make("glm4_moe").fill(CORRECTION, torch.nan, 1)),
    "silent expert": ("zero-experts", lambda make: make("qwen3_moe").fill("experts.2.down_proj", 0.0)),
    "silent expert, fused": ("zero-experts", lambda make: make("granitemoe").fill("output_linear", 0.0, 2)),
    "silent gate, fused": ("zero-experts", silent_gate),
    "origins": ("origins-mismatch", wrong_origins),
}


@pytest.mark.parametrize("name", MENDED | LEFT)
def test_a_trap_is_caught_and_mended(name: str, make: Make, catch: Callable[..., None]) -> None:
    rule, trap = (MENDED | LEFT)[name]
    catch(rule, trap(make), mended=name in MENDED)


def test_a_layer_that_predicts_further_tokens_is_clean(make: Make) -> None:
    assert lint(predicting(make, 4).path) == []


def test_one_is_not_several(make: Make) -> None:
    (finding,) = lint(make("mixtral").without("layers.1.block_sparse_moe.experts.2.w1").path)
    assert finding.what == "1 tensor of the model is not stored."
