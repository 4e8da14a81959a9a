"""Mixing: experts are the branches' networks bit for bit, the rest is the mean, and misfits are refused at once."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from moestro.artifacts import Artifact, Job
from moestro.config import MixConfig
from moestro.data.tokenizer import train_bpe
from moestro.errors import InputError
from moestro.mixing import mix
from moestro.models.checkpoint import load_model, save_model
from moestro.models.files import read_origins
from moestro.models.routers import routers
from moestro.models.routing import record_routes

Write = Callable[..., Artifact]
DOMAINS = ("code", "docs", "sums")


def artifact(folder: Path, stage: str = "branch") -> Artifact:
    return Artifact(folder, stage, folder.name)


def write_tokens(folder: Path, low: int, high: int, count: int = 4000) -> Artifact:
    folder.mkdir()
    ids = np.random.default_rng(low).integers(low, high, count).astype(np.uint16)
    np.save(folder / "train.npy", ids)
    np.save(folder / "train_documents.npy", np.zeros(1, dtype=np.int64))
    return artifact(folder, "tokens")


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory, write_dense: Callable[..., Path]) -> Write:
    """Writes a model with tied embeddings and a chat template. Further arguments are fields of its config."""
    folder = tmp_path_factory.mktemp("tokenizer")
    made = train_bpe(["for x in range(10): pass"] * 4, 300)
    made.chat_template = "{{ messages[0]['content'] }}"
    made.save_pretrained(folder)
    own = {"tokenizer_from": folder, "tie_word_embeddings": True, "pad_token_id": None}
    return lambda path, seed, **fields: artifact(write_dense(path, seed, **own | fields))


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory, write: Write) -> dict[str, Artifact]:
    root = tmp_path_factory.mktemp("members")
    return {name: write(root / name, number) for number, name in enumerate(("seed", *DOMAINS))}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    root = tmp_path_factory.mktemp("tokens")
    return {name: write_tokens(root / name, 100 * number, 100 * (number + 1)) for number, name in enumerate(DOMAINS)}


def run(members: Mapping[str, Artifact], tokens: Mapping[str, Artifact], out: Path, **fields: Any) -> dict[str, Any]:
    out.mkdir(parents=True, exist_ok=True)
    branches = {name: member for name, member in members.items() if name != "seed"}
    job = Job(out=out, scratch=out.parent)
    return mix(MixConfig.model_validate(fields), seed=members["seed"], branches=branches, tokens=tokens, job=job)


def all_rest(**method: Any) -> dict[str, Any]:
    return dict.fromkeys(("attention", "norms", "embeddings"), method)


def weights_of(artifact: Artifact | Path) -> dict[str, torch.Tensor]:
    return load_file((artifact.path if isinstance(artifact, Artifact) else artifact) / "model.safetensors")


@pytest.mark.parametrize("with_seed", [True, False])
def test_experts_are_bit_equal_and_the_rest_is_the_mean(
    members: dict[str, Artifact], tokens: dict[str, Artifact], tmp_path: Path, with_seed: bool
) -> None:
    result = run(
        members,
        tokens,
        tmp_path / "out",
        generalist="expert" if with_seed else "none",
        rest=all_rest(type="mean", include_seed=with_seed),
    )
    mixed = weights_of(tmp_path / "out")
    order = [*DOMAINS, *(["seed"] if with_seed else [])]
    assert result["experts"] == order
    assert read_origins(tmp_path / "out") == [order, order]
    dense = {name: weights_of(members[name]) for name in order}
    for layer in range(2):
        for expert, name in enumerate(order):
            for moe, part in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
                own = dense[name][f"model.layers.{layer}.mlp.{part}.weight"]
                assert torch.equal(mixed[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{moe}.weight"], own)
    shared = [name for name in mixed if "block_sparse_moe" not in name]
    assert len(shared) == 2 + 2 * 6
    for name in shared:
        mean = torch.stack([dense[member][name] for member in order]).double().mean(0)
        torch.testing.assert_close(mixed[name].double(), mean, rtol=1e-7, atol=1e-9)


def test_weights_on_which_all_agree_stay_as_they_are(
    members: dict[str, Artifact], tokens: dict[str, Artifact], tmp_path: Path
) -> None:
    same = dict.fromkeys(members, members["code"])
    run(same, tokens, tmp_path / "out", generalist="none", router={"type": "zero"})
    before, after = weights_of(members["code"]), weights_of(tmp_path / "out")
    shared = [name for name in after if "block_sparse_moe" not in name]
    assert all(torch.equal(before[name], after[name]) for name in shared)


def test_bfloat16_is_kept_and_averaged_without_its_rounding(
    tokens: dict[str, Artifact], write: Write, tmp_path: Path
) -> None:
    names = ("seed", *DOMAINS)
    members = {name: write(tmp_path / name, number, dtype=torch.bfloat16) for number, name in enumerate(names)}
    run(members, tokens, tmp_path / "out")
    mixed, name = weights_of(tmp_path / "out"), "model.layers.1.self_attn.q_proj.weight"
    assert {weight.dtype for weight in mixed.values()} == {torch.bfloat16}
    stacked = torch.stack([weights_of(member)[name] for member in members.values()])
    assert torch.equal(mixed[name], stacked.float().mean(0).bfloat16())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(("router", "method"), [("zero", "ties"), ("random", "dare"), ("centroid", "mean")])
def test_mixing_again_gives_the_same_bytes(
    members: dict[str, Artifact], tokens: dict[str, Artifact], tmp_path: Path, router: str, method: str
) -> None:
    fields = {"router": {"type": router}, "rest": all_rest(type=method)}
    first = run(members, tokens, tmp_path / "first", **fields)
    torch.manual_seed(99)
    assert first == run(members, tokens, tmp_path / "second", **fields)
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "second").iterdir())
    for name in files:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


def test_companions_come_from_the_seed(
    members: dict[str, Artifact], tokens: dict[str, Artifact], tmp_path: Path
) -> None:
    seed = artifact(Path(shutil.copytree(members["seed"].path, tmp_path / "seed")))
    (seed.path / "generation_config.json").write_text(json.dumps({"temperature": 0.3, "do_sample": True}))
    result = run(members | {"seed": seed}, tokens, tmp_path / "out")
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (seed.path / name).read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == 0
    model = load_model(tmp_path / "out")
    assert result["size_bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert result["parameters"] == sum(weight.numel() for weight in model.parameters())
    assert result["active_parameters"] == result["parameters"] - 2 * 2 * 3 * 64 * 96


def test_random_routers_depend_on_the_seed_alone(
    members: dict[str, Artifact], tokens: dict[str, Artifact], tmp_path: Path
) -> None:
    def router(name: str, **fields: Any) -> torch.Tensor:
        run(members, {}, tmp_path / name, router={"type": "random", **fields})
        return weights_of(tmp_path / name)["model.layers.1.block_sparse_moe.gate.weight"]

    first, other, wide = router("a"), router("b", seed=1), router("c", std=0.2)
    assert 0.015 < first.std() < 0.025
    assert not torch.equal(first, other)
    torch.testing.assert_close(wide, first * 10)


def test_centroids_send_each_domain_to_its_own_expert(
    members: dict[str, Artifact], tokens: dict[str, Artifact], tmp_path: Path
) -> None:
    seed = load_model(members["seed"].path)
    with torch.no_grad():  # words of one domain are alike
        for domain in range(3):
            seed.get_input_embeddings().weight[100 * domain : 100 * (domain + 1), 20 * domain : 20 * domain + 20] += 0.2
    save_model(seed, tmp_path / "seed", tokenizer_from=members["seed"].path)
    run(dict.fromkeys(members, artifact(tmp_path / "seed")), tokens, tmp_path / "out", num_experts_per_tok=1)
    model = load_model(tmp_path / "out")
    for layer, router in enumerate(routers(model)):
        assert not router.weight[3].any(), layer
        assert router.weight[:3].any(dim=1).all()
    for expert, name in enumerate(DOMAINS):
        ids = torch.randint(100 * expert, 100 * (expert + 1), (4, 64), generator=torch.Generator().manual_seed(7))
        with record_routes(model) as record, torch.no_grad():
            model(ids)
        for layer in range(2):
            share = (record.ids[layer] == expert).float().mean()
            assert share > 0.7, (name, layer, share)
            assert 0.3 < record.logits[layer][:, :3].std() < 3


def test_a_centroid_row_ignores_what_all_domains_share(
    members: dict[str, Artifact], tokens: dict[str, Artifact], tmp_path: Path
) -> None:
    run(members, tokens, tmp_path / "out")
    dense, entering = load_model(members["seed"].path), []
    dense.model.layers[0].mlp.register_forward_pre_hook(lambda _, args: entering.append(args[0][0].double()))
    means = []
    for name in DOMAINS:
        ids = torch.from_numpy(np.load(tokens[name].path / "train.npy").astype(np.int64))
        with torch.no_grad():
            for window in ids[: 15 * 256].reshape(15, 1, 256):
                dense(window)
        means.append(torch.cat(entering).mean(0))
        entering.clear()
    overall_D = torch.stack(means).mean(0)
    rows_ED = weights_of(tmp_path / "out")["model.layers.0.block_sparse_moe.gate.weight"].double()
    assert (rows_ED @ overall_D).abs().max() < 1e-4
    own_EE = rows_ED[:3] @ torch.stack(means).T
    assert torch.equal(own_EE.argmax(dim=1), torch.arange(3))


def test_one_error_lists_all_differences(
    members: dict[str, Artifact], tokens: dict[str, Artifact], write: Write, tmp_path: Path
) -> None:
    deep = write(tmp_path / "deep", 1, num_hidden_layers=3, vocab_size=330)
    coarse = write(tmp_path / "coarse", 1, dtype=torch.bfloat16)
    other = artifact(Path(shutil.copytree(members["docs"].path, tmp_path / "other")))
    train_bpe(["something else entirely"] * 4, 300).save_pretrained(other.path)
    bare = artifact(Path(shutil.copytree(members["docs"].path, tmp_path / "bare")))
    (bare.path / "tokenizer.json").unlink()
    odd = artifact(Path(shutil.copytree(members["docs"].path, tmp_path / "odd")))
    weights = weights_of(odd)
    weights["model.norm.weight"] = weights["model.norm.weight"][:60].clone()
    save_file(weights, odd.path / "model.safetensors", metadata={"format": "pt"})
    branches = {
        "deep": deep,
        "coarse": coarse,
        "other": other,
        "bare": bare,
        "qwen": write(tmp_path / "qwen", 1, kind="qwen3", head_dim=16),
        "odd": odd,
    }
    with pytest.raises(InputError) as raised:
        run({"seed": members["seed"], **branches}, {}, tmp_path / "out", router={"type": "zero"})
    message = str(raised.value)
    for part in (
        "deep: num_hidden_layers is 3, the seed's is 2",
        "deep: vocab_size is 330 for a tokenizer of 272 ids, the seed's is 320 for one of 272",
        "coarse: dtype is 'bfloat16', the seed's is 'float32'",
        "other: its tokenizer does not go with the seed's",
        "bare holds no tokenizer",
        "qwen: model_type is 'qwen3', the seed's is 'llama'",
        "odd: model.norm.weight is F32 [60], the seed's is F32 [64]",
        "Copy broken checkpoints again",
        "Only models of one architecture share attention",
        "Weights do not fit their config.json",
        "Layers, hidden size and heads cannot be matched",
        "Save all checkpoints in one type",
        "train the branches with the seed's tokenizer",
        "`mix.unify_vocabulary: true`",
    ):
        assert part in message, message
    assert not list((tmp_path / "out").iterdir())


def test_branches_may_differ_in_the_width_of_their_networks(
    members: dict[str, Artifact], write: Write, tmp_path: Path
) -> None:
    narrow = write(tmp_path / "narrow", 1, intermediate_size=48)
    result = run({"seed": members["seed"], "narrow": narrow}, {}, tmp_path / "out", router={"type": "zero"})
    assert result["experts"] == ["narrow", "seed"]
    load_model(tmp_path / "out")


def test_inputs_that_do_not_fit_together_are_refused(
    members: dict[str, Artifact], tokens: dict[str, Artifact], write: Write, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no branch"):
        run({"seed": members["seed"]}, tokens, tmp_path / "out")
    with pytest.raises(InputError, match="nothing to choose"):
        run({"seed": members["seed"], "code": members["code"]}, tokens, tmp_path / "out", generalist="none")
    with pytest.raises(InputError, match="No tokens of docs"):
        run({name: members[name] for name in ("seed", "docs")}, {}, tmp_path / "out")
    biased = write(tmp_path / "biased", 1, attention_bias=True)
    with pytest.raises(InputError, match="attention_bias"):
        run({"seed": biased, "code": biased}, tokens, tmp_path / "out")
    with pytest.raises(InputError, match="called 'seed'"):
        mix(
            MixConfig(),
            seed=members["seed"],
            branches={"seed": members["code"]},
            tokens=tokens,
            job=Job(out=tmp_path, scratch=tmp_path),
        )


def test_a_branch_without_tokenizer_or_with_truncated_weights_is_named(
    members: dict[str, Artifact], tokens: dict[str, Artifact], tmp_path: Path
) -> None:
    bare = artifact(Path(shutil.copytree(members["docs"].path, tmp_path / "bare")))
    (bare.path / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="bare holds no tokenizer"):
        run({"seed": members["seed"], "docs": bare}, tokens, tmp_path / "out")
    cut = artifact(Path(shutil.copytree(members["docs"].path, tmp_path / "cut")))
    weights = cut.path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"cut/model\.safetensors"):
        run({"seed": members["seed"], "docs": cut}, tokens, tmp_path / "out")
