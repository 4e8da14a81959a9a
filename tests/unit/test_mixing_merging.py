"""Merging of the weights outside the experts: each method equals a whole-tensor reference, whatever the blocks."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from moestro.artifacts import Artifact, ArtifactStore, Job, SilentReporter
from moestro.config import Dare, Mean, MergeConfig, MixConfig, Resources, RestConfig, Ties
from moestro.data.tokenizer import train_bpe
from moestro.execution import Step, run_step
from moestro.mixing import mix
from moestro.mixing.merging import METHODS, Merger, group_of, sources
from moestro.mixing.merging.dare import kept
from moestro.models.checkpoint import load_model, save_model
from moestro.models.vocabulary import Vocabulary
from moestro.models.weights import StoredWeights

NAME = "model.layers.0.self_attn.q_proj.weight"
SHAPE = (37, 53)
METHOD_CONFIGS: dict[str, MergeConfig] = {
    "mean": Mean(),
    "mean without seed": Mean(include_seed=False),
    "ties mean": Ties(density=0.3, weight=0.8),
    "ties sum": Ties(density=0.3, combine="sum", weight=0.8),
    "ties whole": Ties(density=1.0),
    "dare mean": Dare(density=0.4, weight=0.7, seed=5),
    "dare sum": Dare(density=0.4, combine="sum", weight=0.7, seed=5),
    "dare whole": Dare(density=1.0),
}


def ties_reference(config: Ties, seed: Tensor, branches: list[Tensor]) -> Tensor:
    """The three steps as the paper has them, on whole tensors."""
    vectors = [branch.double() - seed.double() for branch in branches]
    for vector in vectors:
        smallest = (
            vector.float().abs().flatten().sort(descending=True).values[round(config.density * vector.numel()) - 1]
        )
        vector[vector.float().abs() < smallest] = 0
    stacked = torch.stack(vectors)
    positive, negative = stacked.clamp_min(0).sum(0), -stacked.clamp_max(0).sum(0)
    merged = torch.zeros(seed.shape, dtype=torch.float64)
    for sign, wins in ((1, positive > negative), (-1, negative > positive)):
        agreeing = stacked * (stacked.sign() == sign)
        count = (agreeing != 0).sum(0).clamp_min(1) if config.combine == "mean" else 1
        merged[wins] = (agreeing.sum(0) / count)[wins]
    return seed.double() + config.weight * merged


def dare_reference(config: Dare, seed: Tensor, branches: list[Tensor]) -> Tensor:
    """Drop and rescale, on whole tensors and with the same choice."""
    merged = torch.zeros(seed.shape, dtype=torch.float64)
    for index, branch in enumerate(branches):
        keep = kept(config, NAME, index, 0, seed.numel()).reshape(seed.shape)
        merged[keep] += (branch.double() - seed.double())[keep] / config.density
    if config.combine == "mean":
        merged /= len(branches)
    return seed.double() + config.weight * merged


def reference(config: MergeConfig, seed: Tensor, branches: list[Tensor]) -> Tensor:
    if isinstance(config, Ties):
        return ties_reference(config, seed, branches)
    if isinstance(config, Dare):
        return dare_reference(config, seed, branches)
    assert isinstance(config, Mean)
    return torch.stack([*branches, *([seed] if config.include_seed else [])]).double().mean(0)


def stored(folder: Path, **tensors: Tensor) -> StoredWeights:
    folder.mkdir(parents=True)
    save_file({name.replace("__", "."): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    return StoredWeights(folder)


def three_branches(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """A seed and branches that have learnt different amounts; part of the weights nobody has touched."""
    generator = torch.Generator().manual_seed(3)
    seed = torch.randn(SHAPE, generator=generator)
    seed[4, :9] = -0.0
    steps = [torch.randn(SHAPE, generator=generator) * size for size in (0.01, 0.05, 0.2)]
    branches = [seed + step for step in steps]
    for branch in branches:
        branch[3:9] = seed[3:9]
    branches[0][4, 0] = 0.0
    return seed.to(dtype), [branch.to(dtype) for branch in branches]


def merged(config: MergeConfig, seed: Tensor, branches: list[Tensor], root: Path) -> Tensor:
    key = NAME.replace(".", "__")
    models = [stored(root / str(number), **{key: tensor}) for number, tensor in enumerate([seed, *branches])]
    rest = RestConfig(attention=config)
    others = {f"branch{number}": model for number, model in enumerate(models[1:])}
    merger = Merger(rest, models[0], others, Vocabulary("seed", {}, {}))
    result = merger.weight(NAME, torch.float64)
    assert result.shape == SHAPE
    return result.read()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHOD_CONFIGS)
def test_methods_equal_their_reference_on_whole_tensors(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    seed, branches = three_branches(dtype)
    config = METHOD_CONFIGS[method]
    found = merged(config, seed, branches, tmp_path)
    torch.testing.assert_close(found, reference(config, seed, branches), rtol=0, atol=1e-12)
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    untouched = torch.stack([branch.view(bits) == seed.view(bits) for branch in branches]).all(0)
    assert untouched.float().mean() > 0.1
    assert torch.equal(found[untouched].view(torch.int64), seed.double()[untouched].view(torch.int64))
    assert not torch.equal(found, seed.double())


@pytest.mark.parametrize("method", METHOD_CONFIGS)
def test_blocks_of_any_size_give_the_same_bits(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seed, branches = three_branches(torch.float32)
    whole = merged(METHOD_CONFIGS[method], seed, branches, tmp_path / "whole")
    for elements in (1, 5 * 4 * SHAPE[1], 11 * 4 * SHAPE[1]):
        monkeypatch.setattr(sources, "BLOCK_ELEMENTS", elements)
        found = merged(METHOD_CONFIGS[method], seed, branches, tmp_path / str(elements))
        assert torch.equal(found.view(torch.int64), whole.view(torch.int64)), elements


def test_dare_keeps_its_share_and_chooses_anew_for_each_seed_weight_and_branch() -> None:
    config, count = Dare(density=0.3), 100_000
    first = kept(config, NAME, 0, 0, count)
    assert abs(first.double().mean() - 0.3) < 0.01
    for other in (
        kept(config, NAME, 1, 0, count),
        kept(config, "b", 0, 0, count),
        kept(Dare(seed=1), NAME, 0, 0, count),
    ):
        assert 0.3 < (first != other).double().mean() < 0.6
    assert torch.equal(kept(config, NAME, 0, 777, 50), first[777:827])


def test_ties_keeps_all_of_equal_magnitudes_and_nothing_where_signs_weigh_the_same(tmp_path: Path) -> None:
    seed = torch.zeros(SHAPE)
    up, down = torch.full(SHAPE, 0.5), torch.full(SHAPE, 0.5)
    up[0], down[1] = 2, -0.5
    found = merged(Ties(density=0.1), seed, [up, down], tmp_path)
    assert found[0].unique().tolist() == [1.25]
    assert not found[1].any()
    assert found[2:].unique().tolist() == [0.5]


def test_every_weight_has_its_module_group() -> None:
    groups = {
        "model.layers.3.self_attn.k_proj.bias": "attention",
        "model.layers.3.self_attn.q_norm.weight": "attention",
        "model.layers.3.post_attention_layernorm.weight": "norms",
        "model.norm.weight": "norms",
        "model.embed_tokens.weight": "embeddings",
        "lm_head.weight": "embeddings",
    }
    assert {name: group_of(name) for name in groups} == groups
    assert set(groups.values()) == set(RestConfig.model_fields)
    assert set(METHODS) == {"seed", "mean", "ties", "dare"}


FIELDS = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.2,
}


def write_model(folder: Path, tokenizer: Path, number: int, change: Callable[[str], bool]) -> Path:
    """A model of the one seed, in which the weights that `change` names have moved."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**FIELDS))
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if change(name):
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.05)
    save_model(model, folder, tokenizer_from=tokenizer)
    return folder


def run(seed: Path, branches: dict[str, Path], out: Path, **fields: Any) -> dict[str, Any]:
    out.mkdir()
    config = MixConfig.model_validate({"router": {"type": "random"}} | fields)
    return mix(
        config,
        seed=Artifact(seed, "seed", "0"),
        branches={name: Artifact(folder, "branch", name) for name, folder in branches.items()},
        tokens={},
        job=Job(out=out, scratch=out.parent),
    )


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A seed, branches that trained everything, and branches that trained their feed-forward networks alone."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = root / "tokenizer"
    train_bpe(["for x in range(10): pass"] * 4, 300).save_pretrained(tokenizer)
    changes: dict[str, Callable[[str], bool]] = {
        "seed": lambda _: False,
        "code": lambda _: True,
        "prose": lambda _: True,
        "code_ffn": lambda name: ".mlp." in name,
        "prose_ffn": lambda name: ".mlp." in name,
    }
    return {
        name: write_model(root / name, tokenizer, number, change)
        for number, (name, change) in enumerate(changes.items())
    }


def test_each_module_group_is_merged_by_its_own_method(models: dict[str, Path], tmp_path: Path) -> None:
    branches = {"code": models["code"], "prose": models["prose"]}
    rest = {"attention": {"type": "ties"}, "norms": {"type": "seed"}, "embeddings": {"type": "mean"}}
    result = run(models["seed"], branches, tmp_path / "out", rest=rest)
    seed, code, prose = (weights_of(models[name]) for name in ("seed", "code", "prose"))
    mixed = weights_of(tmp_path / "out")
    for name in (name for name in mixed if "block_sparse_moe" not in name):
        group = group_of(name)
        if group == "norms":
            expected = seed[name].double()
        elif group == "embeddings":
            expected = torch.stack([code[name], prose[name], seed[name]]).double().mean(0)
        else:
            expected = ties_reference(Ties(), seed[name], [code[name], prose[name]])
        assert torch.equal(mixed[name], expected.float()), name
    assert {group: entry["method"] for group, entry in result["rest"].items()} == {
        "attention": "ties",
        "norms": "seed",
        "embeddings": "mean",
    }
    attention = result["rest"]["attention"]
    assert attention["weights"] == 2 * (2 * 32 * 32 + 2 * 16 * 32)
    assert attention["differing"] > 0.99
    assert 0.4 < attention["conflicting"] < 0.6


@pytest.mark.parametrize("method", ["mean", "ties", "dare", "seed"])
def test_branches_that_trained_their_networks_alone_leave_nothing_to_average(
    models: dict[str, Path], tmp_path: Path, method: str
) -> None:
    rest = {group: {"type": method} for group in RestConfig.model_fields}
    branches = {"code": models["code_ffn"], "prose": models["prose_ffn"]}
    result = run(models["seed"], branches, tmp_path / "out", rest=rest)
    seed, mixed = weights_of(models["seed"]), weights_of(tmp_path / "out")
    shared = [name for name in mixed if "block_sparse_moe" not in name]
    assert len(shared) == 3 + 2 * 6
    assert all(torch.equal(mixed[name], seed[name]) for name in shared)
    assert {entry["method"] for entry in result["rest"].values()} == {"nothing to average"}
    assert {entry["differing"] for entry in result["rest"].values()} == {0.0}


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_shards_hold_the_same_weights_as_one_file(models: dict[str, Path], tmp_path: Path, method: str) -> None:
    rest = {group: {"type": method} for group in RestConfig.model_fields}
    branches = {"code": models["code"], "prose": models["prose"]}
    run(models["seed"], branches, tmp_path / "one", rest=rest)
    run(models["seed"], branches, tmp_path / "shards", rest=rest, max_shard_bytes=20_000)
    one, shards = StoredWeights(tmp_path / "one"), StoredWeights(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert set(one) == set(shards)
    assert all(torch.equal(one[name].read(), shards[name].read()) for name in one)


def test_a_head_that_becomes_one_of_its_own_is_merged_as_the_embedding_it_was(
    models: dict[str, Path], tmp_path: Path
) -> None:
    tied = {name: Path(shutil.copytree(models[name], tmp_path / name)) for name in ("seed", "code", "prose")}
    for folder in tied.values():
        weights = weights_of(folder)
        del weights["lm_head.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    seed = tied.pop("seed")
    run(seed, tied, tmp_path / "out", target="glm4_moe", rest={"embeddings": {"type": "dare"}})
    mixed = weights_of(tmp_path / "out")
    assert torch.equal(mixed["lm_head.weight"], mixed["model.embed_tokens.weight"])
    assert not torch.equal(mixed["lm_head.weight"], weights_of(seed)["model.embed_tokens.weight"])


def test_an_interrupted_mix_publishes_nothing_and_starts_anew(models: dict[str, Path], tmp_path: Path) -> None:
    class Interrupting(SilentReporter):
        def progress(self, done: int, total: int, message: str = "") -> None:
            if message == "writing" and done > total / 2:
                raise KeyboardInterrupt

    store = ArtifactStore(tmp_path)
    inputs = {
        "seed": Artifact(models["seed"], "seed", "5" * 64),
        "branches": {name: Artifact(models[name], "branch", name[0] * 64) for name in ("code", "prose")},
        "tokens": {},
    }
    step = Step("mix", MixConfig.model_validate({"router": {"type": "zero"}}), inputs)
    with pytest.raises(KeyboardInterrupt):
        run_step(store, step, resources=Resources(), reporter=Interrupting())
    assert not list((tmp_path / "artifacts").rglob("*.safetensors"))
    published = run_step(store, step, resources=Resources())
    load_model(published.path)
