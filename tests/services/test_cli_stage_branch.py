"""`moestro stage branch` alone: one that is trained with general text, and one that is there already."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from moestro.data.tokenizer import train_bpe
from moestro.errors import InputError
from moestro.models.checkpoint import load_model, save_model
from moestro_services.cli.app import app

SIZES: dict[str, Any] = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
TRAIN = "{type: train, domain: code, training: {steps: 2, batch_size: 2, sequence_length: 16}"


@pytest.fixture
def seed(tmp_path: Path) -> Path:
    train_bpe(["while True: pass"] * 4, 300).save_pretrained(tmp_path / "tokenizer")
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, num_attention_heads=2, num_key_value_heads=1))
    save_model(model, tmp_path / "seed", tokenizer_from=tmp_path / "tokenizer")
    return tmp_path / "seed"


def tokens(folder: Path) -> Path:
    folder.mkdir()
    for split in ("train", "held_out"):
        np.save(folder / f"{split}.npy", np.arange(200, dtype=np.uint16))
        np.save(folder / f"{split}_documents.npy", np.zeros(1, dtype=np.int64))
    return folder


def stage_branch(seed: Path, config: str, *inputs: str) -> Any:
    path = seed.parent / "branch.yaml"
    path.write_text(config)
    given = ["--config", str(path), "--out", str(seed.parent / "out"), "--json"]
    roles = [part for item in (f"seed={seed}", *inputs) for part in ("--input", item)]
    return CliRunner().invoke(app, ["stage", "branch", *given, *roles])


def test_a_branch_that_is_there_needs_no_tokens(seed: Path) -> None:
    done = stage_branch(seed, f"{{type: import, domain: code, path: {seed}}}")
    assert done.exit_code == 0, done.exception
    assert json.loads(done.stdout)["result"]["source"] == "directory"
    assert (seed.parent / "out" / "model.safetensors").read_bytes() == (seed / "model.safetensors").read_bytes()


def test_general_text_is_handed_in_by_domain(seed: Path) -> None:
    own, web = tokens(seed.parent / "own"), tokens(seed.parent / "web")
    config = TRAIN + ", general_share: 0.5}"
    done = stage_branch(seed, config, f"tokens={own}", f"general/web={web}")
    assert done.exit_code == 0, done.exception
    assert json.loads(done.stdout)["result"]["tokens"] == 2 * 2 * 16
    assert load_model(seed.parent / "out", tokenizer=True)


def test_a_branch_to_train_asks_for_its_tokens(seed: Path) -> None:
    done = stage_branch(seed, TRAIN + "}")
    assert isinstance(done.exception, InputError)
    assert "no tokens of code" in done.exception.message
