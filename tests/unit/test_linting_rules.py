"""Every trap, planted in a tiny checkpoint of its own, is caught by its rule; a clean checkpoint has no findings."""

import copy
import json
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from moestro.data.tokenizer import train_bpe
from moestro.errors import InputError
from moestro.linting import RULES, lint, refuse_errors, refuse_faulty, repair
from moestro.models.checkpoint import load_model

SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "intermediate_size": 24},
    "qwen2_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 16,
        "norm_topk_prob": True,
    },
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 32, "norm_topk_prob": True},
    "flex_olmo": {"num_experts": 4, "intermediate_size": 24, "norm_topk_prob": True},
    "olmoe": {"num_experts": 4, "intermediate_size": 24, "norm_topk_prob": False},
    "granitemoe": {"num_local_experts": 4, "intermediate_size": 24},
    "glm4_moe": {
        "n_routed_experts": 4,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 0,
        "head_dim": 32,
        "partial_rotary_factor": 1.0,
    },
}
Weights = dict[str, Tensor]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(["while True: pass"] * 4, 300).save_pretrained(folder)
    return folder


@pytest.fixture
def make(tokenizer: Path, tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint as transformers saves it; fields are the config's."""

    def build(family: str, **fields: Any) -> Path:
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **copy.deepcopy({**SMALL, **FAMILIES[family], **fields}))
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "gate" in name or "router" in name or name.endswith("bias"):
                    weight.normal_()  # transformers starts some at zero
        folder = tmp_path / "checkpoint"
        model.save_pretrained(folder)
        for path in tokenizer.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        return folder

    return build


def set_fields(folder: Path, *, drop: Iterable[str] = (), **fields: Any) -> None:
    path = folder / "config.json"
    kept = {name: value for name, value in json.loads(path.read_text()).items() if name not in set(drop)}
    path.write_text(json.dumps(kept | fields))


def change_weights(folder: Path, change: Callable[[Weights], Weights | None]) -> None:
    path = folder / "model.safetensors"
    weights = {name: weight.clone() for name, weight in load_file(path).items()}
    changed = change(weights)
    changed = weights if changed is None else changed
    save_file({name: weight.clone() for name, weight in changed.items()}, path, metadata={"format": "pt"})


def set_rope(folder: Path, **fields: Any) -> None:
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    set_fields(folder, rope_parameters=rope | fields)


def rename(old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: change_weights(
        folder, lambda weights: {name.replace(old, new): weight for name, weight in weights.items()}
    )


def without(*parts: str) -> Callable[[Path], None]:
    return lambda folder: change_weights(
        folder,
        lambda weights: {name: item for name, item in weights.items() if not any(part in name for part in parts)},
    )


def added(name: str, weight: Tensor) -> Callable[[Path], None]:
    return lambda folder: change_weights(folder, lambda weights: weights | {name: weight})


def filled(part: str, value: float, *index: int) -> Callable[[Path], None]:
    def change(weights: Weights) -> None:
        for name, weight in weights.items():
            if part in name:
                weight[index] = value

    return lambda folder: change_weights(folder, change)


def fields(**values: Any) -> Callable[[Path], None]:
    return lambda folder: set_fields(folder, **values)


def dropped(*names: str) -> Callable[[Path], None]:
    return lambda folder: set_fields(folder, drop=names)


def rope(**values: Any) -> Callable[[Path], None]:
    return lambda folder: set_rope(folder, **values)


def spoilt(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        for change in changes:
            change(folder)

    return plant


def predicting(count: int) -> Callable[[Path], None]:
    """A layer behind the last one with `count` experts, as GLM-4.5 keeps the one that predicts a further token."""

    def change(weights: Weights) -> None:
        for name in list(weights):
            expert = name.partition(".experts.")[2].partition(".")[0]
            if name.startswith("model.layers.1.") and (not expert or int(expert) < count):
                rows = weights[name][:count] if ".gate." in name else weights[name]
                weights[name.replace("layers.1.", "layers.2.")] = rows
        weights["model.layers.2.eh_proj.weight"] = torch.ones(64, 128)

    return spoilt(lambda folder: change_weights(folder, change), fields(num_nextn_predict_layers=1))


def by_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")


def transposed_gate(folder: Path) -> None:
    change_weights(folder, lambda weights: {n: w.T.contiguous() if ".gate." in n else w for n, w in weights.items()})


def packed(code: torch.dtype) -> Callable[[Path], None]:
    """Experts packed by a quantiser, beside their scales."""

    def change(weights: Weights) -> Weights:
        kept = {name: weight for name, weight in weights.items() if ".experts." not in name}
        for name in weights.keys() - kept.keys():
            kept[name.replace(".weight", ".qweight")] = torch.zeros(3, 8, dtype=code)
        return kept

    return spoilt(lambda folder: change_weights(folder, change), fields(quantization_config={"quant_method": "awq"}))


def fused_like_memory(folder: Path) -> None:
    """Mixtral's experts as transformers holds them in memory, and as some merging tools write them."""

    def change(weights: Weights) -> Weights:
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

    change_weights(folder, change)


def cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def stray_file(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({name: weight * 2 for name, weight in weights.items()}, folder / "older.safetensors")


def wrong_index(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    places = dict.fromkeys([*weights, "model.layers.9.input_layernorm.weight"], "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def shard_missing(folder: Path) -> None:
    wrong_index(folder)
    (folder / "model-00001-of-00001.safetensors").unlink()


def wrong_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["model.norm.weight"]["shape"] = [63]
    text = json.dumps(header).encode().ljust(length)
    assert len(text) >= length
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def narrower_expert(folder: Path) -> None:
    def change(weights: Weights) -> None:
        for name, weight in weights.items():
            if ".0.block_sparse_moe.experts.1." in name:
                weights[name] = weight[:, :16] if ".w2." in name else weight[:16]

    change_weights(folder, change)


def copied_experts(folder: Path) -> None:
    def change(weights: Weights) -> None:
        for name in weights:
            for expert in "123":
                if f".experts.{expert}." in name:
                    weights[name] = weights[name.replace(f".experts.{expert}.", ".experts.0.")]

    change_weights(folder, change)
    set_fields(folder, norm_topk_prob=False)


def copied_experts_by_default(folder: Path) -> None:
    copied_experts(folder)
    set_fields(folder, drop=["norm_topk_prob"])


def silent_gate(folder: Path) -> None:
    """Of one of Granite's experts, which lie in one tensor, gate above up."""

    def change(weights: Weights) -> None:
        for name, weight in weights.items():
            if "input_linear" in name:
                weight[1, :24] = 0

    change_weights(folder, change)


def related_experts(folder: Path) -> None:
    def change(weights: Weights) -> None:
        for name in weights:
            if ".experts.1." in name:
                weights[name] = weights[name.replace(".experts.1.", ".experts.0.")] + weights[name] * 0.1

    change_weights(folder, change)
    set_fields(folder, norm_topk_prob=False)


def same_rows(folder: Path) -> None:
    filled("gate.weight", 0.0)(folder)


def tied_with_other_head(folder: Path) -> None:
    set_fields(folder, tie_word_embeddings=True)


def tied_without_head(folder: Path) -> None:
    set_fields(folder, tie_word_embeddings=True)
    without("lm_head")(folder)


def integers(folder: Path) -> None:
    def change(weights: Weights) -> None:
        for name, weight in weights.items():
            if "q_proj" in name:
                weights[name] = (weight * 100).to(torch.int8)

    change_weights(folder, change)


def doubles(folder: Path) -> None:
    change_weights(folder, lambda weights: {name: weight.double() for name, weight in weights.items()})


def halves(folder: Path) -> None:
    def change(weights: Weights) -> None:
        for name, weight in weights.items():
            if ".experts." in name:
                weights[name] = weight.half()

    change_weights(folder, change)


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def small_embedding(folder: Path) -> None:
    change_weights(
        folder,
        lambda weights: {
            name: weight[:250] if name in {"lm_head.weight", "model.embed_tokens.weight"} else weight
            for name, weight in weights.items()
        },
    )
    set_fields(folder, vocab_size=250)


def other_end(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))


def wrong_origins(folder: Path) -> None:
    (folder / "experts.json").write_text(json.dumps({"origins": [["code", "prose"]] * 2}))


def nothing(_folder: Path) -> None:
    """The config alone is the trap."""


BIAS = "model.layers.0.self_attn.q_proj.bias"
CORRECTION = "e_score_correction_bias"


@dataclass(frozen=True)
class Trap:
    """A checkpoint of `family` with `built` config fields, spoilt by `plant`."""

    rule: str
    family: str
    plant: Callable[[Path], None] = nothing
    built: tuple[tuple[str, Any], ...] = ()
    mended: bool = False
    """Whether a repaired copy is expected to be without it."""


TRAPS = {
    "cut off": Trap("damaged-files", "mixtral", cut_off),
    "pointer": Trap("damaged-files", "mixtral", pointer),
    "pickle": Trap("no-safetensors", "mixtral", by_pickle),
    "header disagrees": Trap("damaged-files", "mixtral", wrong_header),
    "shard missing": Trap("damaged-files", "mixtral", shard_missing),
    "stray file": Trap("stray-files", "mixtral", stray_file, mended=True),
    "index": Trap("index-mismatch", "mixtral", wrong_index, mended=True),
    "head size missing": Trap("unusable-config", "qwen3_moe", fields(head_dim=None)),
    "none chosen": Trap("unusable-config", "granitemoe", fields(num_experts_per_tok=None)),
    "count is text": Trap("unusable-config", "mixtral", fields(num_local_experts="three")),
    "count is a list": Trap("unusable-config", "qwen3_moe", fields(num_local_experts=[4])),
    "quantised": Trap("quantised", "mixtral", fields(quantization_config={"quant_method": "gptq"})),
    "packed": Trap("quantised", "mixtral", packed(torch.int32)),
    "packed into a rare type": Trap("quantised", "qwen3_moe", packed(torch.uint32)),
    "quantised GLM": Trap("quantised", "glm4_moe", packed(torch.float8_e4m3fn)),
    "architectures missing": Trap("architectures", "mixtral", dropped("architectures"), mended=True),
    "architectures foreign": Trap(
        "architectures", "qwen3_moe", fields(architectures=["Qwen3ForCausalLM"]), mended=True
    ),
    "gelu": Trap("activation", "mixtral", fields(hidden_act="gelu")),
    "fused as in memory": Trap("expert-names", "mixtral", fused_like_memory, mended=True),
    "router elsewhere": Trap("expert-names", "mixtral", rename("block_sparse_moe.gate", "mlp.gate"), mended=True),
    "projections by Llama's names": Trap("expert-names", "mixtral", rename(".w1.", ".gate_proj."), mended=True),
    "projections by Mixtral's names": Trap(
        "expert-names", "qwen3_moe", rename("experts.0.gate_proj", "experts.0.w1"), mended=True
    ),
    "count": Trap("expert-count", "mixtral", fields(num_local_experts=6), mended=True),
    "count of a fused layout": Trap("expert-count", "granitemoe", fields(num_local_experts=3), mended=True),
    "count twice": Trap("expert-count", "mixtral", fields(num_experts=3), mended=True),
    "count beside": Trap("expert-count", "qwen2_moe", fields(num_local_experts=3), mended=True),
    "width": Trap("expert-width", "qwen3_moe", fields(moe_intermediate_size=32), mended=True),
    "uneven": Trap("uneven-experts", "mixtral", narrower_expert, mended=True),
    "vocabulary": Trap("vocabulary-size", "mixtral", fields(vocab_size=400), mended=True),
    "gate transposed": Trap("shapes", "qwen3_moe", transposed_gate),
    "shape": Trap("shapes", "mixtral", fields(num_key_value_heads=2)),
    "expert missing": Trap("missing-tensors", "mixtral", without("layers.1.block_sparse_moe.experts.2.w1")),
    "layer too many": Trap("missing-tensors", "mixtral", fields(num_hidden_layers=3)),
    "layer too few": Trap("layer-count", "mixtral", fields(num_hidden_layers=1), mended=True),
    "layer too few, by kind": Trap(
        "layer-count",
        "qwen3_moe",
        fields(num_hidden_layers=1, layer_types=["full_attention"]),
        mended=True,
    ),
    "layers below none": Trap("layer-count", "mixtral", fields(num_hidden_layers=-1), mended=True),
    "layers with a gap": Trap(
        "layer-count",
        "mixtral",
        spoilt(rename("layers.2.", "layers.3."), fields(num_hidden_layers=2)),
        built=(("num_hidden_layers", 3),),
    ),
    "layer behind is not whole": Trap(
        "layer-count", "mixtral", spoilt(without("layers.1.self_attn.q_proj"), fields(num_hidden_layers=1))
    ),
    "layer taken for a predicting one": Trap(
        "layer-count", "glm4_moe", fields(num_hidden_layers=1, num_nextn_predict_layers=1), mended=True
    ),
    "predicting layer": Trap("predicting-layers", "glm4_moe", predicting(3)),
    "foreign tensor": Trap("unread-tensors", "mixtral", added("model.extra.weight", torch.ones(3)), mended=True),
    "foreign bias": Trap("unread-biases", "mixtral", added(BIAS, torch.ones(64))),
    "empty shared expert": Trap(
        "empty-tensors", "qwen2_moe", built=(("shared_expert_intermediate_size", 0),), mended=True
    ),
    "no shared expert": Trap("no-shared-expert", "glm4_moe", built=(("n_shared_experts", 0),), mended=True),
    "shared expert of Qwen3": Trap(
        "foreign-shared-expert", "qwen3_moe", fields(shared_expert_intermediate_size=16), mended=True
    ),
    "OLMoE renormalised": Trap("ignored-renormalisation", "olmoe", fields(norm_topk_prob=True)),
    "copies": Trap("unnormalised-copies", "qwen3_moe", copied_experts, mended=True),
    "copies by default": Trap(
        "unnormalised-copies",
        "flex_olmo",
        copied_experts_by_default,
        mended=True,
    ),
    "related": Trap("unnormalised-gates", "qwen2_moe", related_experts),
    "gates not told": Trap("unnormalised-gates", "qwen3_moe", dropped("norm_topk_prob")),
    "too many chosen": Trap("impossible-choice", "mixtral", fields(num_experts_per_tok=5)),
    "groups of one": Trap("impossible-choice", "glm4_moe", fields(n_group=4)),
    "groups do not divide": Trap("impossible-choice", "glm4_moe", fields(n_group=3)),
    "small groups": Trap("small-groups", "glm4_moe", fields(n_group=2, topk_group=1, num_experts_per_tok=3)),
    "no correction bias": Trap("missing-correction-bias", "glm4_moe", without(CORRECTION), mended=True),
    "zero router": Trap("unreachable-experts", "mixtral", same_rows),
    "bias of minus infinity": Trap("not-finite", "glm4_moe", filled(CORRECTION, -torch.inf, 1)),
    "bias too low": Trap("unreachable-experts", "glm4_moe", filled(CORRECTION, -1.5, 1)),
    "silent expert": Trap("zero-experts", "qwen3_moe", filled("experts.2.down_proj", 0.0)),
    "silent expert, fused": Trap("zero-experts", "granitemoe", filled("output_linear", 0.0, 2)),
    "silent gate, fused": Trap("zero-experts", "granitemoe", silent_gate),
    "biases off": Trap("missing-qkv-biases", "qwen2_moe", built=(("qkv_bias", False),), mended=True),
    "biases absent": Trap("missing-qkv-biases", "qwen2_moe", without(".bias"), mended=True),
    "biases of Granite": Trap("dropped-attention-biases", "granitemoe", built=(("attention_bias", True),)),
    "biases of OLMoE": Trap("dropped-attention-biases", "olmoe", built=(("attention_bias", True),)),
    "bias of Qwen3's output": Trap("dropped-attention-biases", "qwen3_moe", built=(("attention_bias", True),)),
    "heads do not divide": Trap(
        "impossible-heads", "mixtral", built=(("num_attention_heads", 3), ("num_key_value_heads", 2), ("head_dim", 32))
    ),
    "head size": Trap("ignored-head-size", "granitemoe", built=(("head_dim", 48),)),
    "small heads": Trap("cpu-head-size", "mixtral", built=(("num_attention_heads", 4),)),
    "window in a Granite": Trap("sliding-windows", "granitemoe", fields(sliding_window=8), mended=True),
    "window in a FlexOlmo": Trap("sliding-windows", "flex_olmo", fields(sliding_window=8), mended=True),
    "window of nothing": Trap("sliding-windows", "mixtral", fields(sliding_window=0), mended=True),
    "window in some layers": Trap(
        "sliding-windows",
        "qwen2_moe",
        lambda folder: set_fields(folder, drop=["layer_types"], use_sliding_window=True, sliding_window=8),
    ),
    "norms of OLMoE": Trap("olmoe-attention", "olmoe", fields(rms_norm_eps=1e-6)),
    "clipping of OLMoE": Trap("olmoe-attention", "olmoe", fields(clip_qkv=1.0)),
    "partial rotation": Trap("partial-rotation", "mixtral", rope(partial_rotary_factor=0.5), mended=True),
    "partial rotation beside": Trap("partial-rotation", "qwen3_moe", fields(partial_rotary_factor=0.5), mended=True),
    "rotation of GLM": Trap(
        "default-rotation",
        "glm4_moe",
        lambda folder: set_fields(folder, drop=["partial_rotary_factor"], rope_parameters={"rope_theta": 1e4}),
    ),
    "theta not told": Trap("default-theta", "mixtral", dropped("rope_parameters")),
    "theta twice": Trap("two-rotations", "mixtral", fields(rope_theta=5e5)),
    "scaling hides parameters": Trap(
        "two-rotations", "mixtral", fields(rope_scaling={"rope_type": "linear", "factor": 2.0})
    ),
    "longrope": Trap(
        "rotation-by-length",
        "mixtral",
        rope(
            rope_type="longrope", short_factor=[1.0] * 16, long_factor=[2.0] * 16, original_max_position_embeddings=32
        ),
        built=(("head_dim", 32),),
    ),
    "dynamic": Trap("rotation-by-length", "qwen3_moe", rope(rope_type="dynamic", factor=2.0)),
    "whole factor": Trap("rotation-fields", "mixtral", rope(rope_type="linear", factor=2), mended=True),
    "null option": Trap(
        "rotation-fields",
        "qwen3_moe",
        rope(rope_type="yarn", factor=2.0, original_max_position_embeddings=32, beta_fast=None),
        mended=True,
    ),
    "tied GLM": Trap("tied-head", "glm4_moe", tied_without_head, mended=True),
    "tied OLMoE": Trap("tied-head", "olmoe", built=(("tie_word_embeddings", True),), mended=True),
    "tied, other head": Trap("second-head", "mixtral", tied_with_other_head, mended=True),
    "no head": Trap("missing-head", "mixtral", without("lm_head")),
    "no head in a GLM": Trap("missing-head", "glm4_moe", without("lm_head")),
    "NaN": Trap("not-finite", "mixtral", filled("layers.1.block_sparse_moe.experts.3.w2", torch.nan, 5, 7)),
    "infinity": Trap("not-finite", "granitemoe", filled("norm", -torch.inf, 3)),
    "correction bias is NaN": Trap("not-finite", "glm4_moe", filled(CORRECTION, torch.nan, 1)),
    "integers": Trap("unscaled-weights", "mixtral", integers),
    "doubles": Trap("double-precision", "mixtral", doubles, mended=True),
    "mixed types": Trap("stored-types", "mixtral", halves),
    "type not told": Trap("stored-types", "mixtral", dropped("dtype")),
    "no tokenizer": Trap("missing-tokenizer", "mixtral", no_tokenizer),
    "large tokenizer": Trap("large-tokenizer", "mixtral", small_embedding),
    "pad outside": Trap("pad-token", "flex_olmo", dropped("pad_token_id"), mended=True),
    "end outside": Trap("special-tokens", "mixtral", fields(bos_token_id=1000)),
    "end disagrees": Trap("end-of-text", "mixtral", other_end),
    "origins": Trap("origins-mismatch", "mixtral", wrong_origins),
}


def rules(folder: Path) -> set[str]:
    return {finding.rule for finding in lint(folder)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_clean_checkpoint_has_no_findings(family: str, make: Callable[..., Path]) -> None:
    assert lint(make(family)) == []


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "flex_olmo", "granitemoe"])
def test_a_tied_head_is_clean_where_both_engines_tie_it(family: str, make: Callable[..., Path]) -> None:
    assert lint(make(family, tie_word_embeddings=True)) == []


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_window_that_both_engines_see_is_clean(family: str, make: Callable[..., Path]) -> None:
    folder = make(family)
    set_fields(folder, sliding_window=8, use_sliding_window=True)
    assert lint(folder) == []


def test_layouts_that_both_engines_read_are_clean(make: Callable[..., Path]) -> None:
    folder = make("granitemoe")
    rename("input_linear.weight", "experts.gate_up_proj")(folder)
    rename("output_linear.weight", "experts.down_proj")(folder)
    rename("router.layer.weight", "router.weight")(folder)
    assert lint(folder) == []


@pytest.mark.parametrize("name", TRAPS)
def test_a_trap_is_caught_and_mended(name: str, make: Callable[..., Path], tmp_path: Path) -> None:
    trap = TRAPS[name]
    folder = make(trap.family, **dict(trap.built))
    trap.plant(folder)
    findings = lint(folder)
    assert {finding.rule for finding in findings} == {trap.rule}, findings
    (finding,) = findings
    assert finding.fixable == trap.mended
    assert all((finding.where, finding.what, finding.transformers, finding.vllm, finding.remedy))
    if trap.mended:
        repair(folder, findings, tmp_path / "repaired")
        assert lint(tmp_path / "repaired") == []
        load_model(tmp_path / "repaired", experts="eager", tokenizer=True)


def test_every_rule_has_a_trap() -> None:
    caught = {trap.rule for trap in TRAPS.values()}
    assert set(RULES) - caught == {"unknown-architecture"}
    mendable = {name for name, rule in RULES.items() if rule.mend}
    assert {trap.rule for trap in TRAPS.values() if trap.mended} == mendable
    assert all(bool(rule.mends) == bool(rule.mend) for rule in RULES.values())


def test_an_unknown_architecture_is_checked_for_what_can_be(make: Callable[..., Path]) -> None:
    folder = make("mixtral")
    config = AutoConfig.for_model(
        "phimoe", **copy.deepcopy(SMALL), num_local_experts=4, intermediate_size=24, head_dim=32
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    assert rules(folder) == {"unknown-architecture"}
    filled("lm_head.weight", torch.nan)(folder)
    assert rules(folder) == {"unknown-architecture", "not-finite"}


def test_findings_can_be_kept_to_one_engine(make: Callable[..., Path]) -> None:
    folder = make("mixtral", num_attention_heads=4)
    other_end(folder)
    assert {finding.rule for finding in lint(folder, engines=["vllm"])} == {"cpu-head-size"}
    assert {finding.rule for finding in lint(folder, engines=["transformers"])} == {"end-of-text"}


def test_what_is_made_here_is_refused_by_the_rules_name(make: Callable[..., Path]) -> None:
    folder = make("olmoe")
    refuse_errors(folder)
    set_fields(folder, norm_topk_prob=True)
    with pytest.raises(InputError, match="ignored-renormalisation"):
        refuse_errors(folder)


def test_experts_may_join_and_leave_whatever_an_engine_makes_of_the_rest(make: Callable[..., Path]) -> None:
    folder = make("olmoe", norm_topk_prob=True)
    assert refuse_faulty(folder) == {"ignored-renormalisation"}
    refuse_errors(folder, but=refuse_faulty(folder))
    without("layers.1.input_layernorm")(folder)
    with pytest.raises(InputError, match=r"wrong already \(missing-tensors"):
        refuse_faulty(folder)


def test_the_layers_of_a_longer_model_are_kept(make: Callable[..., Path], tmp_path: Path) -> None:
    folder = make("mixtral", num_hidden_layers=3)
    set_fields(folder, num_hidden_layers=2)
    repair(folder, lint(folder), tmp_path / "repaired")
    assert json.loads((tmp_path / "repaired" / "config.json").read_text())["num_hidden_layers"] == 3
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "repaired"))
    assert before.keys() == after.keys()


def test_a_layer_that_predicts_further_tokens_is_clean(make: Callable[..., Path]) -> None:
    folder = make("glm4_moe")
    predicting(4)(folder)
    assert lint(folder) == []


def test_the_config_of_quantised_weights_is_checked_and_mended(make: Callable[..., Path], tmp_path: Path) -> None:
    folder = make("mixtral")
    packed(torch.uint16)(folder)
    set_fields(folder, architectures=["LlamaForCausalLM"], num_experts_per_tok=5)
    findings = lint(folder)
    assert {finding.rule for finding in findings} == {"quantised", "architectures", "impossible-choice"}
    assert [finding.affects for finding in findings if finding.rule == "quantised"] == [()]
    repair(folder, findings, tmp_path / "repaired")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "repaired"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert rules(tmp_path / "repaired") == {"quantised", "impossible-choice"}


def test_findings_name_what_is_in_the_file(make: Callable[..., Path]) -> None:
    folder = make("qwen3_moe")
    (field,) = {"num_experts", "num_local_experts"} & json.loads((folder / "config.json").read_text()).keys()
    set_fields(folder, drop=(), **{field: 6})
    assert [finding.where for finding in lint(folder)] == [(field,)]
    set_fields(folder, drop=(), num_experts_per_tok=5, **{field: 4})
    (finding,) = lint(folder)
    assert finding.where == ("num_experts_per_tok",)


def test_one_is_not_several(make: Callable[..., Path]) -> None:
    folder = make("mixtral")
    without("layers.1.block_sparse_moe.experts.2.w1")(folder)
    (finding,) = lint(folder)
    assert finding.what == "1 tensor of the model is not stored."


def test_dense_models_and_empty_folders_are_refused(make: Callable[..., Path], tmp_path: Path) -> None:
    folder = make("mixtral")
    set_fields(folder, drop=["num_local_experts"])
    with pytest.raises(InputError, match="dense"):
        lint(folder)
    with pytest.raises(InputError, match=r"config\.json"):
        lint(tmp_path)


def test_several_troubles_are_mended_at_once(make: Callable[..., Path], tmp_path: Path) -> None:
    folder = make("qwen2_moe", qkv_bias=False, shared_expert_intermediate_size=0)
    set_fields(folder, architectures=["LlamaForCausalLM"])
    findings = lint(folder)
    troubles = {"architectures", "missing-qkv-biases", "empty-tensors"}
    assert {finding.rule for finding in findings} == troubles
    assert findings == sorted(findings, key=lambda finding: finding.severity)
    repair(folder, findings, tmp_path / "repaired")
    assert lint(tmp_path / "repaired") == []


def test_nothing_is_overwritten_and_nothing_half_written_stays(make: Callable[..., Path], tmp_path: Path) -> None:
    folder = make("mixtral")
    narrower_expert(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    findings = lint(folder)
    out = tmp_path / "copies" / "repaired"
    (tmp_path / "copies").mkdir()
    with pytest.raises(InputError, match="exists"):
        repair(folder, findings, tmp_path / "copies")

    def interrupt(done: int, total: int) -> None:
        if 0 < done < total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repair(folder, findings, out, progress=interrupt)
    assert list(out.parent.iterdir()) == []
    repair(folder, findings, out)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_copy_holds_every_other_file_as_it_was(make: Callable[..., Path], tmp_path: Path) -> None:
    folder = make("mixtral")
    set_fields(folder, architectures=["LlamaForCausalLM"])
    (folder / "README.md").write_text("About.")
    (folder / "pytorch_model.bin").write_bytes(b"old")
    repair(folder, lint(folder), tmp_path / "repaired")
    names = {path.name for path in folder.iterdir()} - {"pytorch_model.bin"}
    assert {path.name for path in (tmp_path / "repaired").iterdir()} == names
    for name in names - {"config.json"}:
        assert (tmp_path / "repaired" / name).read_bytes() == (folder / name).read_bytes(), name
