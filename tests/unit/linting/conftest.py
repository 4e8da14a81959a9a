"""Tiny sound checkpoints of every kind, ways to spoil them, and the check that a trap is caught by its rule alone."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from moestro.linting import lint, repair
from moestro.models.checkpoint import load_model
from moestro.models.layouts import LAYOUTS

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
OWN: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"shared_expert_intermediate_size": 16, "norm_topk_prob": True},
    "qwen3_moe": {"head_dim": 32, "norm_topk_prob": True},
    "flex_olmo": {"norm_topk_prob": True},
    "olmoe": {"norm_topk_prob": False},
    "glm4_moe": {"first_k_dense_replace": 0, "head_dim": 32, "partial_rotary_factor": 1.0},
}
Weights = dict[str, Tensor]


class Checkpoint:
    """A checkpoint in the folder `path`. Every change returns it, so that changes can be chained."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.weights = path / "config.json", path / "model.safetensors"

    def set(self, **fields: Any) -> "Checkpoint":
        self.config.write_text(json.dumps(json.loads(self.config.read_text()) | fields))
        return self

    def drop(self, *names: str) -> "Checkpoint":
        config = json.loads(self.config.read_text())
        self.config.write_text(json.dumps({name: value for name, value in config.items() if name not in names}))
        return self

    def rope(self, **fields: Any) -> "Checkpoint":
        return self.set(rope_parameters=json.loads(self.config.read_text())["rope_parameters"] | fields)

    def change(self, change: Callable[[Weights], Weights | None]) -> "Checkpoint":
        """`change` returns other weights, or changes those that it is given."""
        weights = {name: weight.clone() for name, weight in load_file(self.weights).items()}
        changed = change(weights)
        changed = weights if changed is None else changed
        save_file({name: weight.clone() for name, weight in changed.items()}, self.weights, metadata={"format": "pt"})
        return self

    def rename(self, old: str, new: str) -> "Checkpoint":
        return self.change(lambda weights: {name.replace(old, new): weight for name, weight in weights.items()})

    def without(self, *parts: str) -> "Checkpoint":
        def change(weights: Weights) -> Weights:
            return {name: item for name, item in weights.items() if not any(part in name for part in parts)}

        return self.change(change)

    def add(self, name: str, weight: Tensor) -> "Checkpoint":
        return self.change(lambda weights: weights | {name: weight})

    def fill(self, part: str, value: float, *index: int) -> "Checkpoint":
        """All tensors with `part` in their names, whole or at an index."""

        def change(weights: Weights) -> None:
            for name, weight in weights.items():
                if part in name:
                    weight[index] = value

        return self.change(change)

    def narrow(self, part: str) -> "Checkpoint":
        """Leaves 16 features of Mixtral's experts with `part` in their names."""

        def change(weights: Weights) -> None:
            for name, weight in weights.items():
                if part in name:
                    weights[name] = weight[:, :16] if ".w2." in name else weight[:16]

        return self.change(change)


@pytest.fixture
def make(tokenizer: Path, tmp_path: Path) -> Callable[..., Checkpoint]:
    """Makes a checkpoint as transformers saves it. Further arguments are fields of its config."""

    def build(kind: str, **fields: Any) -> Checkpoint:
        torch.manual_seed(0)
        sizes = {LAYOUTS[kind].num_experts: 4, LAYOUTS[kind].expert_width: 24} if kind in LAYOUTS else {}
        config = AutoConfig.for_model(kind, **copy.deepcopy({**SMALL, **sizes, **OWN.get(kind, {}), **fields}))
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "gate" in name or "router" in name or name.endswith("bias"):
                    weight.normal_()  # transformers starts some at zero
        folder = tmp_path / "checkpoint"
        model.save_pretrained(folder)
        for path in tokenizer.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        return Checkpoint(folder)

    return build


@pytest.fixture
def catch(tmp_path: Path) -> Callable[..., None]:
    """Checks that a rule, and no other, finds something, and that a repaired copy is sound if it can be mended."""

    def check(rule: str, trap: Checkpoint, *, mended: bool) -> None:
        findings = lint(trap.path)
        assert {finding.rule for finding in findings} == {rule}, findings
        (finding,) = findings
        assert finding.fixable == mended
        assert all((finding.where, finding.what, finding.transformers, finding.vllm, finding.remedy))
        if mended:
            repair(trap.path, findings, tmp_path / "repaired")
            assert lint(tmp_path / "repaired") == []
            load_model(tmp_path / "repaired", experts="eager", tokenizer=True)

    return check
