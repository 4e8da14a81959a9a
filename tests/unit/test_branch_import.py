"""A branch that exists is brought in as it is, in the seed's type, if it can be mixed with the seed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen3Config

from moestro.artifacts import Artifact, Job
from moestro.branching import branch
from moestro.config import ImportBranch, MixConfig, RandomRouter
from moestro.data.tokenizer import train_bpe
from moestro.errors import InputError
from moestro.mixing import mix
from moestro.models.checkpoint import save_model
from moestro.models.files import read_origins
from moestro.models.sources import identify

SHAPE = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def write(folder: Path, *, kind: Any = LlamaConfig, dtype: Any = torch.float32, seed: int = 0, **fields: Any) -> Path:
    torch.manual_seed(seed)
    folder.mkdir()
    train_bpe(["print('hello')"] * 4, 300).save_pretrained(folder)
    save_model(AutoModelForCausalLM.from_config(kind(**SHAPE | fields), dtype=dtype), folder, tokenizer_from=folder)
    return folder


@pytest.fixture
def seed(tmp_path: Path) -> Artifact:
    return Artifact(write(tmp_path / "seed"), "seed", "s")


def job_in(folder: Path) -> Job:
    (folder / "out").mkdir(parents=True)
    (folder / "scratch").mkdir()
    return Job(out=folder / "out", scratch=folder / "scratch")


def bring(path: Path, seed: Artifact, folder: Path, **fields: Any) -> dict[str, Any]:
    config = ImportBranch(domain="code", path=str(path), **fields)
    return branch(config, seed=seed, job=job_in(folder))


def add_token(folder: Path) -> Path:
    """The tokenizer in `folder` knows one token more."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"].append({"id": 300, "content": "<|new|>", "special": True, **flags})
    path.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_it_comes_in_with_the_seeds_type_and_every_weight(stored: torch.dtype, seed: Artifact, tmp_path: Path) -> None:
    source = write(tmp_path / "code", dtype=stored, seed=1)
    result = bring(source, seed, tmp_path / "job")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "job/out/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], weight.float()) for name, weight in before.items())
    assert (result["source"], result["dtype"], result["vocab_size"]) == ("directory", "float32", 320)
    assert not list((tmp_path / "job/scratch").iterdir())


def test_it_is_mixed_like_the_others(seed: Artifact, tmp_path: Path) -> None:
    branches = {}
    for number, name in enumerate(("code", "math"), 1):
        bring(write(tmp_path / name, seed=number, intermediate_size=32 * number), seed, tmp_path / f"job {name}")
        branches[name] = Artifact(tmp_path / f"job {name}/out", "branch", name)
    config = MixConfig(router=RandomRouter())
    mix(config, seed=seed, branches=branches, tokens={}, job=job_in(tmp_path / "mix"))
    assert read_origins(tmp_path / "mix/out") == [["code", "math", "seed"]] * 2


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        ({"hidden_size": 64}, ["code: hidden_size is 64, the seed's is 32", "take branches of the seed's size"]),
        ({"rms_norm_eps": 1e-5}, ["code: rms_norm_eps is 1e-05"]),
        ({"vocab_size": 352}, ["code: vocab_size is 352 for a tokenizer of", "mix.unify_vocabulary"]),
        ({"kind": Qwen3Config}, ["code: model_type is 'qwen3', the seed's is 'llama'"]),
        ({"kind": MixtralConfig, "num_local_experts": 4}, ["code: model_type is 'mixtral'"]),
        ({"hidden_size": 64, "num_hidden_layers": 3}, ["hidden_size is 64", "num_hidden_layers is 3"]),
    ],
)
def test_what_does_not_fit_the_seed_is_refused_by_name(
    fields: dict[str, Any], messages: list[str], seed: Artifact, tmp_path: Path
) -> None:
    source = write(tmp_path / "code", **fields)
    with pytest.raises(InputError) as raised:
        bring(source, seed, tmp_path / "job")
    assert [message for message in messages if message not in f"{raised.value} {raised.value.hint}"] == []
    assert not list((tmp_path / "job/out").iterdir())


def test_a_vocabulary_that_adds_rows_comes_in_where_vocabularies_are_unified(seed: Artifact, tmp_path: Path) -> None:
    source = add_token(write(tmp_path / "code", vocab_size=352))
    with pytest.raises(InputError, match="vocab_size is 352 for a tokenizer of 301 ids"):
        bring(source, seed, tmp_path / "one")
    assert bring(source, seed, tmp_path / "two", unify_vocabulary=True)["vocab_size"] == 352


def test_a_tokenizer_of_other_meaning_is_refused_either_way(seed: Artifact, tmp_path: Path) -> None:
    source = write(tmp_path / "code")
    train_bpe(["something else entirely, again and again"] * 9, 280).save_pretrained(source)
    with pytest.raises(InputError, match="code: its tokenizer does not go with the seed's"):
        bring(source, seed, tmp_path / "job", unify_vocabulary=True)


def test_missing_and_broken_checkpoints_are_named(seed: Artifact, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"branch\.existing\.code\.path: .*nowhere does not exist"):
        bring(tmp_path / "nowhere", seed, tmp_path / "one")
    source = write(tmp_path / "code")
    weights = source / "model.safetensors"
    whole = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(whole[:-1])
    with pytest.raises(InputError, match=r"model\.safetensors has"):
        bring(source, seed, tmp_path / "two")


def test_a_branch_of_a_mixture_of_experts_is_none(tmp_path: Path) -> None:
    moe = Artifact(write(tmp_path / "moe", kind=MixtralConfig, num_local_experts=4), "seed", "s")
    with pytest.raises(InputError, match="Branches belong to a dense seed"):
        bring(write(tmp_path / "code"), moe, tmp_path / "job")


def test_identity_is_the_contents_and_not_the_place(tmp_path: Path) -> None:
    source = write(tmp_path / "code")
    moved = Path(shutil.copytree(source, tmp_path / "elsewhere"))
    first, second = (identify(ImportBranch(domain="code", path=str(path))) for path in (source, moved))
    assert first == second
    add_token(moved)
    assert identify(ImportBranch(domain="code", path=str(moved))) != first
