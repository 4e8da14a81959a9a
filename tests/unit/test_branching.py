"""A branch continues the seed on one domain; with `ffn` nothing but feed-forward networks changes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from moestro.artifacts import Artifact, Job
from moestro.branching import branch
from moestro.branching.training import branch_mixture
from moestro.config import BranchConfig, TrainingConfig
from moestro.data.tokenizer import train_bpe
from moestro.errors import InputError
from moestro.models.checkpoint import load_model, save_model, stored_dtype

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
TRAINING = TrainingConfig(steps=6, batch_size=4, sequence_length=16)


def saved(model: PreTrainedModel, folder: Path) -> Artifact:
    train_bpe(["some text"], 300).save_pretrained(folder / "tokenizer")
    save_model(model, folder / "model", tokenizer_from=folder / "tokenizer")
    return Artifact(folder / "model", "seed", "s")


def tokens_in(folder: Path, domain: str) -> Artifact:
    target = folder / domain
    target.mkdir(parents=True)
    for split in ("train", "held_out"):
        np.save(target / f"{split}.npy", np.random.default_rng(len(domain)).integers(0, 300, 800).astype(np.uint16))
        np.save(target / f"{split}_documents.npy", np.zeros(1, dtype=np.int64))
    return Artifact(target, "tokens", domain)


def job_in(folder: Path) -> Job:
    (folder / "out").mkdir(parents=True)
    (folder / "scratch").mkdir()
    return Job(out=folder / "out", scratch=folder / "scratch")


@pytest.mark.parametrize("trainable", ["ffn", "all"])
def test_what_a_branch_changes(tmp_path: Path, trainable: str) -> None:
    torch.manual_seed(0)
    seed = saved(LlamaForCausalLM(LlamaConfig(**SHAPE)), tmp_path)
    config = BranchConfig.model_validate({"domain": "code", "training": TRAINING, "trainable": trainable})
    result = branch(config, seed=seed, tokens=tokens_in(tmp_path, "code"), job=job_in(tmp_path / "job"))
    before = dict(load_model(seed.path).named_parameters())
    after = dict(load_model(tmp_path / "job/out", tokenizer=True).named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if trainable == "all" or ".mlp." in name}
    assert result["tokens"] == 6 * 4 * 16
    assert (tmp_path / "job/out/history.json").exists()


def test_a_branch_is_stored_in_its_seeds_type(tmp_path: Path) -> None:
    seed = saved(LlamaForCausalLM(LlamaConfig(**SHAPE)).bfloat16(), tmp_path)
    config = BranchConfig(domain="code", training=TRAINING)
    branch(config, seed=seed, tokens=tokens_in(tmp_path, "code"), job=job_in(tmp_path / "job"))
    weights = load_file(tmp_path / "job/out/model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert stored_dtype(tmp_path / "job/out") == torch.bfloat16


def test_a_seed_without_tokenizer_is_refused_before_training(tmp_path: Path) -> None:
    seed, job = saved(LlamaForCausalLM(LlamaConfig(**SHAPE)), tmp_path), job_in(tmp_path / "job")
    (seed.path / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="no tokenizer"):
        branch(BranchConfig(domain="code", training=TRAINING), seed=seed, tokens=tokens_in(tmp_path, "code"), job=job)
    assert not list(job.scratch.iterdir())


def test_general_text_comes_between_and_changes_the_branch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    seed = saved(LlamaForCausalLM(LlamaConfig(**SHAPE)), tmp_path)
    code, general = tokens_in(tmp_path, "code"), {"web": tokens_in(tmp_path, "web"), "law": tokens_in(tmp_path, "law")}
    found = {}
    for share, others in ((0.0, {}), (0.5, general), (0.25, general)):
        config = BranchConfig(domain="code", training=TRAINING, general_share=share)
        result = branch(config, seed=seed, tokens=code, general=others, job=job_in(tmp_path / f"job {share}"))
        found[share] = load_file(tmp_path / f"job {share}/out/model.safetensors")["model.layers.0.mlp.up_proj.weight"]
        assert result["tokens"] == 6 * 4 * 16
    assert not torch.equal(found[0.0], found[0.5])
    assert not torch.equal(found[0.25], found[0.5])


def test_general_text_is_that_of_all_its_domains_alike(tmp_path: Path) -> None:
    config = BranchConfig(domain="code", training=TRAINING, general_share=0.3)
    general = {"law": tokens_in(tmp_path, "law"), "web": tokens_in(tmp_path, "web")}
    mixture = branch_mixture(config, tokens_in(tmp_path, "code"), general)
    assert list(mixture.domains) == ["code", "law", "web"]
    assert mixture.batch(0, 200).domains_B.bincount().tolist() == [140, 30, 30]


@pytest.mark.parametrize(
    ("share", "others", "message"),
    [
        (0.1, (), "general_share is 0.1, and there is no general text"),
        (0.0, ("web",), "Tokens of web are handed in as general text, but general_share is 0"),
        (0.1, ("code",), "of code are handed in as general text of its own branch"),
    ],
)
def test_tokens_that_do_not_suit_the_share_are_refused(
    share: float, others: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    config = BranchConfig(domain="code", training=TRAINING, general_share=share)
    general = {name: tokens_in(tmp_path / "general", name) for name in others}
    with pytest.raises(InputError, match=message):
        branch_mixture(config, tokens_in(tmp_path, "code"), general)
    with pytest.raises(InputError, match="no tokens of code"):
        branch_mixture(config, None, general)


def test_a_branch_of_a_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    seed = saved(MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4)), tmp_path)
    config = BranchConfig(domain="code", training=TRAINING)
    with pytest.raises(InputError, match="is a Mixture-of-Experts"):
        branch(config, seed=seed, tokens=tokens_in(tmp_path, "code"), job=job_in(tmp_path / "job"))
