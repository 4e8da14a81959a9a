"""What `lint --fix` writes makes transformers and vLLM agree on what was meant; before, one fails or is wrong."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from moestro.data.tokenizer import train_bpe
from moestro.inference.engine import EngineConfig, VllmEngine
from moestro.linting import lint, repair
from moestro.linting.rules.attention import CPU_HEAD_SIZES
from moestro.models.checkpoint import load_model
from moestro.rl.probe import trainer_logprobs

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4
"""Largest difference of a token's log-probability, in nats, that two sound implementations have in float32."""
WRONG = 0.01
SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "intermediate_size": 32},
    "qwen2_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 32, "norm_topk_prob": True},
    "granitemoe": {"num_local_experts": 4, "intermediate_size": 32, "attention_multiplier": 0.2},
    "glm4_moe": {
        "n_routed_experts": 4,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 0,
        "head_dim": 32,
        "partial_rotary_factor": 1.0,
    },
}
SEQUENCES = [np.random.default_rng(0).integers(0, 320, size=size).tolist() for size in (9, 33, 48)]
Weights = dict[str, Tensor]


def set_fields(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_weights(folder: Path, change: Callable[[Weights], Weights]) -> None:
    path = folder / "model.safetensors"
    weights = {name: weight.clone() for name, weight in load_file(path).items()}
    save_file({name: weight.clone() for name, weight in change(weights).items()}, path, metadata={"format": "pt"})


def rename(old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: change_weights(
        folder, lambda weights: {name.replace(old, new): weight for name, weight in weights.items()}
    )


def without(part: str) -> Callable[[Path], None]:
    return lambda folder: change_weights(
        folder, lambda weights: {name: weight for name, weight in weights.items() if part not in name}
    )


def fields(**values: Any) -> Callable[[Path], None]:
    return lambda folder: set_fields(folder, **values)


def fused(block: str) -> Callable[[Path], None]:
    """Mixtral's experts of a layer in one tensor, under `block`."""

    def change(weights: Weights) -> Weights:
        kept = {name: weight for name, weight in weights.items() if "block_sparse_moe.experts" not in name}
        for layer in range(2):
            prefix = f"model.layers.{layer}"
            experts = [
                [weights[f"{prefix}.block_sparse_moe.experts.{number}.{name}.weight"] for name in ("w1", "w3", "w2")]
                for number in range(4)
            ]
            kept[f"{prefix}.{block}.gate.weight"] = kept.pop(f"{prefix}.block_sparse_moe.gate.weight")
            kept[f"{prefix}.{block}.experts.gate_up_proj"] = torch.stack([torch.cat(three[:2]) for three in experts])
            kept[f"{prefix}.{block}.experts.down_proj"] = torch.stack([three[2] for three in experts])
        return kept

    return lambda folder: change_weights(folder, change)


def cut_zeros(folder: Path) -> None:
    """The second expert of the first layer without its last features, which are zero."""

    def change(weights: Weights) -> Weights:
        prefix = "model.layers.0.block_sparse_moe.experts.1"
        for name in ("w1", "w2", "w3"):
            weight = weights[f"{prefix}.{name}.weight"]
            weights[f"{prefix}.{name}.weight"] = weight[:, :16] if name == "w2" else weight[:16]
        return weights

    change_weights(folder, change)


def zero_features(folder: Path) -> None:
    def change(weights: Weights) -> Weights:
        for name in ("w1", "w2", "w3"):
            weight = weights[f"model.layers.0.block_sparse_moe.experts.1.{name}.weight"]
            weight[(slice(None), slice(16, None)) if name == "w2" else slice(16, None)] = 0
        return weights

    change_weights(folder, change)


def stray_file(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({name: weight * 0.9 for name, weight in weights.items()}, folder / "older.safetensors")


LINEAR = (("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),)


def whole_factor(folder: Path) -> None:
    set_fields(folder, rope_parameters={**LINEAR[0][1], "factor": 2})


def as_it_is(_folder: Path) -> None:
    """The checkpoint is the trap."""


@dataclass(frozen=True)
class Trap:
    """A checkpoint of `family` with `built` config fields and `meant` weights, spoilt by `plant`."""

    rules: tuple[str, ...]
    family: str
    plant: Callable[[Path], None] = as_it_is
    built: tuple[tuple[str, Any], ...] = ()
    meant: Callable[[Path], None] = as_it_is
    starts: bool = True
    """Whether vLLM can be started on it: one that ends the whole process is not."""


TRAPS = {
    "fused experts that vLLM stops at": Trap(("expert-names",), "mixtral", fused("mlp")),
    "fused experts that vLLM passes over": Trap(("expert-names",), "mixtral", fused("block_sparse_moe")),
    "narrower expert": Trap(("uneven-experts",), "mixtral", cut_zeros, meant=zero_features),
    "partial rotation": Trap(("partial-rotation",), "mixtral", fields(partial_rotary_factor=0.5)),
    "whole factor of linear scaling": Trap(("rotation-fields",), "mixtral", whole_factor, built=LINEAR),
    "stray file": Trap(("stray-files",), "mixtral", stray_file),
    "layer too few": Trap(("layer-count",), "mixtral", fields(num_hidden_layers=1)),
    "another class": Trap(("architectures",), "mixtral", fields(architectures=["LlamaForCausalLM"])),
    "no biases": Trap(("missing-qkv-biases",), "qwen2_moe", built=(("qkv_bias", False),)),
    "empty shared expert": Trap(("empty-tensors",), "qwen2_moe", built=(("shared_expert_intermediate_size", 0),)),
    "shared expert of Qwen3": Trap(("foreign-shared-expert",), "qwen3_moe", fields(shared_expert_intermediate_size=16)),
    "window": Trap(("sliding-windows",), "granitemoe", fields(sliding_window=4)),
    "tied head": Trap(("tied-head",), "glm4_moe", built=(("tie_word_embeddings", True),)),
    "no correction bias": Trap(("missing-correction-bias",), "glm4_moe", without("e_score_correction_bias")),
    "no shared expert": Trap(("no-shared-expert",), "glm4_moe", built=(("n_shared_experts", 0),), starts=False),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(["while True: pass"] * 4, 300).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engines() -> Iterator[dict[Any, VllmEngine]]:
    """The engine that runs, by the config of what it runs; it takes further repaired copies of that config."""
    started: dict[Any, VllmEngine] = {}
    yield started
    close(started)


def close(started: dict[Any, VllmEngine]) -> None:
    while started:
        started.popitem()[1].close()


def build(trap: Trap, tokenizer: Path, folder: Path) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(trap.family, **{**SMALL, **FAMILIES[trap.family], **dict(trap.built)})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or "gate" in name or "router" in name:
                weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(folder)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    trap.meant(folder)
    return folder


def start(folder: Path) -> VllmEngine:
    return VllmEngine(folder, EngineConfig(max_model_len=64, kv_cache_gib=0.1))


def by_vllm(engine: VllmEngine) -> np.ndarray:
    return np.concatenate([score.logprobs for score in engine.score(SEQUENCES)])


def by_transformers(folder: Path) -> np.ndarray:
    model = load_model(folder, experts="eager")
    return np.concatenate([trainer_logprobs(model, sequence, None) for sequence in SEQUENCES])


@contextlib.contextmanager
def uninitialised_memory_is_nan() -> Iterator[None]:
    """Otherwise it may happen to hold zeros, or the right numbers of an earlier engine."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def vllm_is_right(folder: Path, meant: np.ndarray) -> bool:
    with uninitialised_memory_is_nan():
        try:
            engine = start(folder)
        except (ValueError, RuntimeError, AssertionError, TypeError):
            return False
        try:
            found = by_vllm(engine)
        finally:
            engine.close()
    return bool(np.nan_to_num(np.abs(found - meant), nan=np.inf).max() < WRONG)


def test_head_sizes_are_those_of_vllms_cpu_attention() -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert set(CPUAttentionBackend.get_supported_head_sizes()) <= set(CPU_HEAD_SIZES)


def test_a_sound_checkpoint_is_right_where_uninitialised_memory_is_nan(tokenizer: Path, tmp_path: Path) -> None:
    folder = build(Trap((), "qwen2_moe"), tokenizer, tmp_path / "checkpoint")
    assert lint(folder) == []
    assert vllm_is_right(folder, by_transformers(folder))


@pytest.mark.parametrize("name", TRAPS)
def test_a_repaired_copy_is_what_was_meant_for_both(
    name: str, tokenizer: Path, engines: dict[Any, VllmEngine], tmp_path: Path
) -> None:
    trap = TRAPS[name]
    folder = build(trap, tokenizer, tmp_path / "checkpoint")
    meant = by_transformers(folder)
    trap.plant(folder)
    findings = lint(folder)
    assert {finding.rule for finding in findings} == set(trap.rules)
    if trap.starts:
        assert not vllm_is_right(folder, meant)
    repaired = tmp_path / "repaired"
    repair(folder, findings, repaired)
    assert np.array_equal(by_transformers(repaired), meant)
    config = AutoConfig.from_pretrained(repaired).to_dict() | {"architectures": None}
    key = json.dumps([config, sorted(load_file(repaired / "model.safetensors"))], sort_keys=True, default=str)
    if key not in engines:
        close(engines)
        engines[key] = start(repaired)
    else:
        engines[key].refresh(repaired)
    assert np.abs(by_vllm(engines[key]) - meant).max() <= TOLERANCE
