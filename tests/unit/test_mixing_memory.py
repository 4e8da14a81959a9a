"""What mixing takes of memory does not grow with the number of experts."""

import os
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from moestro.data.tokenizer import train_bpe
from moestro.models.checkpoint import save_model
from moestro.models.files import WEIGHTS
from moestro_services.measured_process import measured

pytestmark = pytest.mark.slow

SHAPE = {"vocab_size": 320, "hidden_size": 512, "intermediate_size": 4096, "num_attention_heads": 4}
FEW, MANY = 2, 10
LARGEST = 512 * 4096 * 4
"""Bytes of the largest tensor; every branch brings six of them."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `seed` and branches in files of their own, for a shared file would lie in memory once."""
    folder = tmp_path_factory.mktemp("models")
    train_bpe(["while True: pass"] * 4, 300).save_pretrained(folder / "tokenizer")
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=2))
    for name in ("seed", *(f"branch{number}" for number in range(MANY))):
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.mlp.up_proj.weight)
        save_model(model, folder / name, tokenizer_from=folder / "tokenizer")
    return folder


def peak(models: Path, folder: Path, branches: int, dtype: str) -> tuple[int, int]:
    """Peak memory of a mix in a process of its own, and the size of the weights it wrote, in bytes."""
    config = folder / "mix.yaml"
    config.write_text(yaml.safe_dump({"generalist": "none", "router": {"type": "random"}, "dtype": dtype}))
    out = folder / f"out{branches}"
    roles = {"seed": "seed"} | {f"branches/branch{number}": f"branch{number}" for number in range(branches)}
    inputs = [part for role, name in roles.items() for part in ("--input", f"{role}={models / name}")]
    command = ["-m", "moestro_services.cli", "stage", "mix", "--config", str(config), "--out", str(out), *inputs]
    taken = measured([sys.executable, *command], env=os.environ, log=folder / "log.txt")
    return taken.peak_bytes, (out / WEIGHTS).stat().st_size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_does_not_grow_with_the_number_of_experts(models: Path, tmp_path: Path, dtype: str) -> None:
    """Copied weights (float32) and weights that are made (bfloat16)."""
    few, small = peak(models, tmp_path, FEW, dtype)
    many, large = peak(models, tmp_path, MANY, dtype)
    grown = large - small
    assert grown > 3 * small
    assert many - few < grown / 4
    assert many - few < 4 * LARGEST
