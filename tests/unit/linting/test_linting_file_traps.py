"""Traps in files, the architecture, number types and tokens: each is caught by its rule, and mended where it can be."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moestro.linting import lint, repair

Make = Callable[..., Any]


def cut_off(make: Make) -> Any:
    trap = make("mixtral")
    trap.weights.write_bytes(trap.weights.read_bytes()[:-100])
    return trap


def pointer(make: Make) -> Any:
    trap = make("mixtral")
    trap.weights.write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")
    return trap


def by_pickle(make: Make) -> Any:
    trap = make("mixtral")
    torch.save(load_file(trap.weights), trap.path / "pytorch_model.bin")
    trap.weights.unlink()
    return trap


def wrong_header(make: Make) -> Any:
    trap = make("mixtral")
    content = trap.weights.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["model.norm.weight"]["shape"] = [63]
    text = json.dumps(header).encode().ljust(length)
    assert len(text) >= length
    trap.weights.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return trap


def stray_file(make: Make) -> Any:
    trap = make("mixtral")
    weights = load_file(trap.weights)
    save_file({name: weight * 2 for name, weight in weights.items()}, trap.path / "older.safetensors")
    return trap


def wrong_index(make: Make) -> Any:
    trap = make("mixtral")
    weights = load_file(trap.weights)
    trap.weights.rename(trap.path / "model-00001-of-00001.safetensors")
    places = dict.fromkeys([*weights, "model.layers.9.input_layernorm.weight"], "model-00001-of-00001.safetensors")
    (trap.path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return trap


def shard_missing(make: Make) -> Any:
    trap = wrong_index(make)
    (trap.path / "model-00001-of-00001.safetensors").unlink()
    return trap


def packed(trap: Any, code: torch.dtype) -> Any:
    """Experts packed by a quantiser, beside their scales."""

    def change(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = {name: weight for name, weight in weights.items() if ".experts." not in name}
        for name in weights.keys() - kept.keys():
            kept[name.replace(".weight", ".qweight")] = torch.zeros(3, 8, dtype=code)
        return kept

    return trap.change(change).set(quantization_config={"quant_method": "awq"})


def integers(make: Make) -> Any:
    def change(weights: dict[str, Tensor]) -> None:
        for name, weight in weights.items():
            if "q_proj" in name:
                weights[name] = (weight * 100).to(torch.int8)

    return make("mixtral").change(change)


def halves(make: Make) -> Any:
    def change(weights: dict[str, Tensor]) -> None:
        for name, weight in weights.items():
            if ".experts." in name:
                weights[name] = weight.half()

    return make("mixtral").change(change)


def doubles(make: Make) -> Any:
    return make("mixtral").change(lambda weights: {name: weight.double() for name, weight in weights.items()})


def no_tokenizer(make: Make) -> Any:
    trap = make("mixtral")
    (trap.path / "tokenizer.json").unlink()
    return trap


def small_embedding(make: Make) -> Any:
    def change(weights: dict[str, Tensor]) -> None:
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            weights[name] = weights[name][:250]

    return make("mixtral").change(change).set(vocab_size=250)


def other_end(make: Make) -> Any:
    trap = make("mixtral")
    (trap.path / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    return trap


MENDED: dict[str, tuple[str, Make]] = {
    "stray file": ("stray-files", stray_file),
    "index": ("index-mismatch", wrong_index),
    "architectures missing": ("architectures", lambda make: make("mixtral").drop("architectures")),
    "architectures foreign": (
        "architectures",
        lambda make: make("qwen3_moe").set(architectures=["Qwen3ForCausalLM"]),
    ),
    "doubles": ("double-precision", doubles),
}
"""By the trap's name: the rule that catches it, and what makes a checkpoint with it."""
LEFT: dict[str, tuple[str, Make]] = {
    "cut off": ("damaged-files", cut_off),
    "pointer": ("damaged-files", pointer),
    "pickle": ("no-safetensors", by_pickle),
    "header disagrees": ("damaged-files", wrong_header),
    "shard missing": ("damaged-files", shard_missing),
    "head size missing": ("unusable-config", lambda make: make("qwen3_moe").set(head_dim=None)),
    "none chosen": ("unusable-config", lambda make: make("granitemoe").set(num_experts_per_tok=None)),
    "count is text": ("unusable-config", lambda make: make("mixtral").set(num_local_experts="three")),
    "count is a list": ("unusable-config", lambda make: make("qwen3_moe").set(num_local_experts=[4])),
    "quantised": ("quantised", lambda make: make("mixtral").set(quantization_config={"quant_method": "gptq"})),
    "packed": ("quantised", lambda make: packed(make("mixtral"), torch.int32)),
    "packed into a rare type": ("quantised", lambda make: packed(make("qwen3_moe"), torch.uint32)),
    "quantised GLM": ("quantised", lambda make: packed(make("glm4_moe"), torch.float8_e4m3fn)),
    "gelu": ("activation", lambda make: make("mixtral").set(hidden_act="gelu")),
    "NaN": (
        "not-finite",
        lambda make: make("mixtral").fill("layers.1.block_sparse_moe.experts.3.w2", torch.nan, 5, 7),
    ),
    "infinity": ("not-finite", lambda make: make("granitemoe").fill("norm", -torch.inf, 3)),
    "integers": ("unscaled-weights", integers),
    "mixed types": ("stored-types", halves),
    "type not told": ("stored-types", lambda make: make("mixtral").drop("dtype")),
    "no tokenizer": ("missing-tokenizer", no_tokenizer),
    "large tokenizer": ("large-tokenizer", small_embedding),
    "end outside": ("special-tokens", lambda make: make("mixtral").set(bos_token_id=1000)),
    "end disagrees": ("end-of-text", other_end),
}


@pytest.mark.parametrize("name", MENDED | LEFT)
def test_a_trap_is_caught_and_mended(name: str, make: Make, catch: Callable[..., None]) -> None:
    rule, trap = (MENDED | LEFT)[name]
    catch(rule, trap(make), mended=name in MENDED)


def test_the_config_of_quantised_weights_is_checked_and_mended(make: Make, tmp_path: Path) -> None:
    trap = packed(make("mixtral"), torch.uint16).set(architectures=["LlamaForCausalLM"], num_experts_per_tok=5)
    findings = lint(trap.path)
    assert {finding.rule for finding in findings} == {"quantised", "architectures", "impossible-choice"}
    assert [finding.affects for finding in findings if finding.rule == "quantised"] == [()]
    repair(trap.path, findings, tmp_path / "repaired")
    before, after = (load_file(path / "model.safetensors") for path in (trap.path, tmp_path / "repaired"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {finding.rule for finding in lint(tmp_path / "repaired")} == {"quantised", "impossible-choice"}
