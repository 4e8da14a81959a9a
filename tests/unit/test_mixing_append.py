"""Appending: a branch joins as one more expert, every byte that was there stays, and misfits are refused at once."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    LlamaConfig,
    Olmo2Config,
    OlmoeConfig,
    Qwen2Config,
    Qwen3Config,
)

from moestro.artifacts import Artifact, Job
from moestro.config import AppendConfig, MixConfig, RandomRouter, RemoveConfig
from moestro.data.tokenizer import train_bpe
from moestro.errors import InputError
from moestro.mixing import append, mix, remove
from moestro.models.checkpoint import load_model, read_config, save_model
from moestro.models.files import read_origins
from moestro.models.layouts import LAYOUTS
from moestro.models.routers import parameter_counts
from moestro.models.routing import record_routes
from moestro.models.weights import StoredWeights

SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
}
DENSE: dict[str, Any] = {
    "mixtral": LlamaConfig,
    "qwen2_moe": Qwen2Config,
    "qwen3_moe": Qwen3Config,
    "flex_olmo": Olmo2Config,
    "granitemoe": GraniteConfig,
    "glm4_moe": LlamaConfig,
}
"""By `model_type` of the MoE."""
PARTS = ("gate_proj", "up_proj", "down_proj")


def artifact(folder: Path) -> Artifact:
    return Artifact(folder, "branch", folder.name)


class Family:
    """Dense checkpoints of one kind in a folder, and the MoE that two of them and their seed become."""

    def __init__(self, root: Path, target: str, tokenizer: Path) -> None:
        self.root, self.target, self.tokenizer = root, target, tokenizer

    def dense(self, name: str, seed: int, dtype: torch.dtype = torch.float32, **fields: Any) -> Artifact:
        torch.manual_seed(seed)
        own = {"head_dim": 16} if self.target == "qwen3_moe" else {}
        model = AutoModelForCausalLM.from_config(DENSE[self.target](**SMALL | own | fields), dtype=dtype)
        save_model(model, self.root / name, tokenizer_from=self.tokenizer)
        return artifact(self.root / name)

    def mixed(self, name: str, branches: dict[str, Artifact], seed: Artifact, **fields: Any) -> Artifact:
        out = self.root / name
        out.mkdir()
        config = MixConfig(target=self.target, router=RandomRouter(std=0.5), **fields)
        mix(config, seed=seed, branches=branches, tokens={}, job=Job(out=out, scratch=self.root))
        return artifact(out)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(["while True: pass"] * 4, 300).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=DENSE)
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: Path
) -> tuple[Family, Artifact, Artifact]:
    """A family, its MoE of `code`, `docs` and the seed, and the branch `law`."""
    return build(tmp_path_factory.mktemp(request.param), request.param, tokenizer)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> tuple[Family, Artifact, Artifact]:
    return build(tmp_path_factory.mktemp("one"), "mixtral", tokenizer)


def build(root: Path, target: str, tokenizer: Path) -> tuple[Family, Artifact, Artifact]:
    family = Family(root, target, tokenizer)
    seed, code, docs, law = (family.dense(name, number) for number, name in enumerate(("seed", "code", "docs", "law")))
    return family, family.mixed("moe", {"code": code, "docs": docs}, seed), law


def run(
    model: Artifact, branch: Artifact, out: Path, tokens: dict[str, Artifact] | None = None, **fields: Any
) -> dict[str, Any]:
    out.mkdir(parents=True)
    config = AppendConfig(**{"domain": "law", "router": {"type": "mean"}} | fields)
    return append(config, model=model, branch=branch, tokens=tokens or {}, job=Job(out=out, scratch=out.parent))


def contents(folder: Path) -> dict[str, bytes]:
    """Every tensor's type, shape and bytes."""
    stored = StoredWeights(folder)
    return {
        name: f"{tensor.code} {tensor.shape} ".encode() + tensor.read().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in stored.items()
    }


def write_tokens(folder: Path, ids: np.ndarray) -> Artifact:
    folder.mkdir()
    np.save(folder / "train.npy", ids.astype(np.uint16))
    np.save(folder / "train_documents.npy", np.zeros(1, dtype=np.int64))
    return artifact(folder)


def test_old_tensors_stay_and_the_new_expert_is_the_branchs(
    made: tuple[Family, Artifact, Artifact], tmp_path: Path
) -> None:
    family, moe, law = made
    layout = LAYOUTS[family.target]
    result = run(moe, law, tmp_path / "out")
    before, after = load_file(moe.path / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    branch = load_file(law.path / "model.safetensors")
    seen = set()
    for layer in range(2):
        grown = [layout.router, *([layout.correction_bias] if layout.correction_bias else [])]
        grown += layout.experts.values() if layout.fused else []
        for name in (template.format(layer=layer) for template in grown):
            assert after[name].shape == (4, *before[name].shape[1:])
            assert torch.equal(after[name][:3], before[name])
            seen.add(name)
        own = {part: branch[f"model.layers.{layer}.mlp.{part}.weight"] for part in PARTS}
        if layout.fused:
            gate_up = after[layout.experts["gate_up_proj"].format(layer=layer)][3]
            assert torch.equal(gate_up, torch.cat([own["gate_proj"], own["up_proj"]]))
            assert torch.equal(after[layout.experts["down_proj"].format(layer=layer)][3], own["down_proj"])
        else:
            for part, template in layout.experts.items():
                name = template.format(layer=layer, expert=3)
                assert torch.equal(after[name], own[part])
                seen.add(name)
    assert after.keys() - seen == before.keys() - seen
    assert all(torch.equal(after[name], before[name]) for name in after.keys() - seen)
    origins = ["code", "docs", "seed", "law"]
    assert read_origins(tmp_path / "out") == result["experts"] == [origins, origins]
    assert result["expert_ids"] == [[0, 1, 2]] * 2
    model = load_model(tmp_path / "out")
    assert {name: result[name] for name in ("parameters", "active_parameters")} == parameter_counts(model)
    assert (result["num_experts"], result["num_experts_per_tok"], result["padded_features"]) == (4, 2, 0)


def test_what_is_appended_and_removed_leaves_no_trace(made: tuple[Family, Artifact, Artifact], tmp_path: Path) -> None:
    _, moe, law = made
    run(moe, law, tmp_path / "more")
    (tmp_path / "back").mkdir()
    job = Job(out=tmp_path / "back", scratch=tmp_path)
    result = remove(RemoveConfig(experts=("law",)), model=artifact(tmp_path / "more"), job=job)
    assert result["expert_ids"] == [[0, 1, 2, None]] * 2
    assert contents(tmp_path / "back") == contents(moe.path)
    assert read_config(tmp_path / "back") == read_config(moe.path)
    for path in moe.path.iterdir():
        if path.name != "config.json":
            assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes(), path.name


def test_tokens_that_do_not_choose_the_new_expert_keep_their_logits(
    made: tuple[Family, Artifact, Artifact], tmp_path: Path
) -> None:
    """A feature that is large and positive for every token, and a row that is very negative there.

    What the expert holds is then of no account, not even in the last bit. Against the old model, whose routers multiply
    by a smaller matrix, rounding is.
    """
    family, moe, law = made
    layout = LAYOUTS[family.target]
    base = artifact(Path(shutil.copytree(moe.path, tmp_path / "base")))
    weights = load_file(base.path / "model.safetensors")
    weights["model.embed_tokens.weight"][:, 0] = 50.0
    save_file(weights, base.path / "model.safetensors", {"format": "pt"})
    other = Family(tmp_path, family.target, family.tokenizer).dense("other", 8)
    for name, branch in (("one", law), ("two", other)):
        run(base, branch, tmp_path / name)
        weights = load_file(tmp_path / name / "model.safetensors")
        for layer in range(2):
            weights[layout.router.format(layer=layer)][3] = torch.eye(64)[0] * -1e4
        save_file(weights, tmp_path / name / "model.safetensors", {"format": "pt"})
    ids_BS = torch.randint(320, (2, 33), generator=torch.Generator().manual_seed(1))
    for experts in ("eager", "grouped_mm"):
        models = [load_model(folder, experts=experts) for folder in (base.path, tmp_path / "one", tmp_path / "two")]
        with torch.no_grad(), record_routes(models[1]) as record:
            old, one, two = (model(ids_BS).logits for model in models)
        assert all((ids_TK != 3).all() for ids_TK in record.ids)
        assert torch.equal(one, two), experts
        torch.testing.assert_close(one, old, atol=1e-5, rtol=1e-5)


def test_the_correction_bias_starts_at_the_mean_of_the_others(tokenizer: Path, tmp_path: Path) -> None:
    _, moe, law = build(tmp_path, "glm4_moe", tokenizer)
    weights = load_file(moe.path / "model.safetensors")
    name = LAYOUTS["glm4_moe"].correction_bias.format(layer=1)  # type: ignore[union-attr]
    weights[name] = torch.tensor([0.5, 0.25, 0.75])
    save_file(weights, moe.path / "model.safetensors", {"format": "pt"})
    run(moe, law, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")[name].tolist() == [0.5, 0.25, 0.75, 0.5]


@pytest.mark.parametrize("target", ["qwen2_moe", "glm4_moe"])
def test_beside_a_shared_expert_it_is_the_expert_that_the_mix_would_have_made(
    target: str, tokenizer: Path, tmp_path: Path
) -> None:
    family = Family(tmp_path, target, tokenizer)
    seed, code, docs, law = (family.dense(name, number) for number, name in enumerate(("seed", "code", "docs", "law")))
    moe = family.mixed("two", {"code": code, "docs": docs}, seed, generalist="shared")
    three = family.mixed("three", {"code": code, "docs": docs, "law": law}, seed, generalist="shared")
    run(moe, law, tmp_path / "out")
    expected, found = contents(three.path), contents(tmp_path / "out")
    assert found.keys() == expected.keys()
    experts = [name for name in found if "experts.2." in name]
    assert len(experts) == 6
    assert all(found[name] == expected[name] for name in experts)
    run(moe, law, tmp_path / "whole", output_scale=1.0)
    own = load_file(law.path / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    down = LAYOUTS[target].experts["down_proj"].format(layer=0, expert=2)
    assert torch.equal(load_file(tmp_path / "whole" / "model.safetensors")[down], own)


def test_a_narrower_branch_is_padded_with_zeros(made: tuple[Family, Artifact, Artifact], tmp_path: Path) -> None:
    family, moe, _ = made
    narrow = Family(tmp_path, family.target, family.tokenizer).dense("narrow", 7, intermediate_size=64)
    result = run(moe, narrow, tmp_path / "out")
    assert result["padded_features"] == 32
    layout, branch = LAYOUTS[family.target], load_file(narrow.path / "model.safetensors")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    down = layout.experts["down_proj"].format(layer=1, expert=3)
    down_DF = weights[down][3] if layout.fused else weights[down]
    assert torch.equal(down_DF[:, :64], branch["model.layers.1.mlp.down_proj.weight"])
    assert not down_DF[:, 64:].any()
    if layout.fused:
        up_FD = weights[layout.experts["gate_up_proj"].format(layer=1)][3, 96:]
    else:
        up_FD = weights[layout.experts["up_proj"].format(layer=1, expert=3)]
    assert torch.equal(up_FD[:64], branch["model.layers.1.mlp.up_proj.weight"])
    assert not up_FD[64:].any()
    load_model(tmp_path / "out")


@pytest.mark.parametrize("start", ["centroid", "domain_embedding", "mean", "random", "zero"])
def test_rows_are_as_long_as_the_others_and_the_same_every_time(
    mixtral: tuple[Family, Artifact, Artifact], tmp_path: Path, start: str
) -> None:
    _, moe, law = mixtral
    tokens = {
        name: write_tokens(tmp_path / name, np.random.default_rng(0).integers(low, low + 100, 3000))
        for name, low in (("law", 0), ("code", 100))
    }
    first = run(moe, law, tmp_path / "first", tokens, router={"type": start})
    torch.manual_seed(99)
    assert first == run(moe, law, tmp_path / "second", tokens, router={"type": start})
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name
    assert first["router"] == start
    for layer in range(2):
        rows_ED = load_file(tmp_path / "first" / "model.safetensors")[LAYOUTS["mixtral"].router.format(layer=layer)]
        norms_E = rows_ED.norm(dim=1)
        if start == "zero":
            assert not norms_E[3]
        else:
            torch.testing.assert_close(norms_E[3], norms_E[:3].mean())
        if start == "mean":
            assert torch.cosine_similarity(rows_ED[3], rows_ED[:3].mean(0), dim=0) > 0.9999


def test_random_rows_depend_on_the_seed_and_differ_between_layers(
    mixtral: tuple[Family, Artifact, Artifact], tmp_path: Path
) -> None:
    _, moe, law = mixtral

    def rows(name: str, **fields: Any) -> list[torch.Tensor]:
        run(moe, law, tmp_path / name, router={"type": "random", **fields})
        weights = load_file(tmp_path / name / "model.safetensors")
        return [weights[LAYOUTS["mixtral"].router.format(layer=layer)][3] for layer in range(2)]

    first, other = rows("first"), rows("other", seed=1)
    assert not torch.equal(first[0], other[0])
    assert torch.cosine_similarity(first[0], first[1], dim=0).abs() < 0.5


@pytest.mark.parametrize("start", ["centroid", "domain_embedding"])
def test_rows_from_text_send_the_domain_to_its_expert_and_others_elsewhere(
    made: tuple[Family, Artifact, Artifact], tmp_path: Path, start: str
) -> None:
    """Words of a domain are alike; the router's other rows know nothing of it."""
    _, moe, law = made
    base = artifact(Path(shutil.copytree(moe.path, tmp_path / "base")))
    weights = load_file(base.path / "model.safetensors")
    for domain in range(3):
        weights["model.embed_tokens.weight"][100 * domain : 100 * (domain + 1), 20 * domain : 20 * domain + 20] += 1.0
    save_file(weights, base.path / "model.safetensors", {"format": "pt"})
    generator = np.random.default_rng(3)
    tokens = {
        name: write_tokens(tmp_path / name, generator.integers(100 * number, 100 * (number + 1), 3000))
        for number, name in enumerate(("law", "code", "docs"))
    }
    run(base, law, tmp_path / "out", tokens, router={"type": start, "calibration_tokens": 2048})
    model = load_model(tmp_path / "out")
    shares = []
    for number in range(3):
        ids = torch.randint(100 * number, 100 * (number + 1), (4, 64), generator=torch.Generator().manual_seed(7))
        with record_routes(model) as record, torch.no_grad():
            model(ids)
        shares.append([float((ids_TK == 3).any(dim=1).float().mean()) for ids_TK in record.ids])
    assert min(shares[0]) > 0.6
    assert max(shares[1] + shares[2]) < 0.3


@pytest.mark.parametrize("start", ["centroid", "domain_embedding"])
def test_a_row_from_text_needs_another_domain(
    mixtral: tuple[Family, Artifact, Artifact], tmp_path: Path, start: str
) -> None:
    _, moe, law = mixtral
    tokens = {"law": write_tokens(tmp_path / "law", np.arange(300))}
    with pytest.raises(InputError, match="Only tokens of law itself") as raised:
        run(moe, law, tmp_path / "out", tokens, router={"type": start})
    assert "another domain's tokens" in raised.value.hint


def test_rows_of_zeros_say_nothing_of_how_long_a_row_is(
    mixtral: tuple[Family, Artifact, Artifact], tmp_path: Path
) -> None:
    _, moe, law = mixtral
    names = [LAYOUTS["mixtral"].router.format(layer=layer) for layer in range(2)]

    def with_rows(folder: str, zero: slice) -> Artifact:
        base = artifact(Path(shutil.copytree(moe.path, tmp_path / folder)))
        weights = load_file(base.path / "model.safetensors")
        weights[names[1]][zero] = 0.0
        save_file(weights, base.path / "model.safetensors", {"format": "pt"})
        return base

    run(with_rows("generalist", slice(2, 3)), law, tmp_path / "out", router={"type": "random"})
    rows_ED = load_file(tmp_path / "out" / "model.safetensors")[names[1]]
    torch.testing.assert_close(rows_ED[3].norm(), rows_ED[:2].norm(dim=1).mean())
    nothing = with_rows("nothing", slice(0, 3))
    with pytest.raises(InputError, match="All router rows of layer 1 are zero"):
        run(nothing, law, tmp_path / "refused", router={"type": "random"})
    for start in ("zero", "mean"):
        run(nothing, law, tmp_path / start, router={"type": start})
        assert not load_file(tmp_path / start / "model.safetensors")[names[1]].any()


def test_a_row_from_text_needs_the_domains_tokens(mixtral: tuple[Family, Artifact, Artifact], tmp_path: Path) -> None:
    _, moe, law = mixtral
    tokens = {"code": write_tokens(tmp_path / "code", np.arange(300))}
    with pytest.raises(InputError, match="No tokens of law to start its router row from"):
        run(moe, law, tmp_path / "out", tokens, router={"type": "centroid"})


def test_shards_hold_the_same_tensors(mixtral: tuple[Family, Artifact, Artifact], tmp_path: Path) -> None:
    _, moe, law = mixtral
    run(moe, law, tmp_path / "one")
    run(moe, law, tmp_path / "many", max_shard_bytes=100_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    assert contents(tmp_path / "one") == contents(tmp_path / "many")
    load_model(tmp_path / "many")


def test_one_error_lists_all_differences(mixtral: tuple[Family, Artifact, Artifact], tmp_path: Path) -> None:
    family, moe, _ = mixtral
    other = Family(tmp_path, "mixtral", family.tokenizer)
    odd = other.dense(
        "odd",
        5,
        torch.bfloat16,
        num_hidden_layers=3,
        hidden_size=128,
        intermediate_size=160,
        vocab_size=330,
        rope_parameters={"rope_type": "default", "rope_theta": 77.0},
    )
    train_bpe(["something else entirely"] * 4, 300).save_pretrained(odd.path)
    with pytest.raises(InputError) as raised:
        run(moe, odd, tmp_path / "out")
    for part in (
        "odd cannot join the mixtral model",
        "num_hidden_layers is 3, the model's is 2",
        "hidden_size is 128, the model's is 64",
        "vocab_size is 330, the model's is 320",
        "'rope_theta': 77.0",
        "model.layers.0.mlp.gate_proj.weight is [160, 128]",
        "its tokenizer is not the model's",
        "Train the branch with the model's tokenizer.",
    ):
        assert part in str(raised.value), str(raised.value)
    coarse = other.dense("coarse", 5, torch.bfloat16, intermediate_size=160)
    with pytest.raises(InputError) as raised:
        run(moe, coarse, tmp_path / "again")
    for part in (
        "160 features, the experts 96",
        "never cut: mix again",
        "its weights are bfloat16, the experts' are float32",
        "Import the branch in the model's type",
    ):
        assert part in str(raised.value), str(raised.value)
    assert not list((tmp_path / "out").iterdir())


def test_a_branch_of_another_architecture_is_refused(
    mixtral: tuple[Family, Artifact, Artifact], tmp_path: Path
) -> None:
    family, moe, _ = mixtral
    qwen = Family(tmp_path / "qwen", "qwen3_moe", family.tokenizer).dense("qwen", 1)
    with pytest.raises(InputError, match="it is a qwen3 model, not a llama or mistral"):
        run(moe, qwen, tmp_path / "out")
    biased = Family(tmp_path, "mixtral", family.tokenizer).dense("biased", 1, mlp_bias=True)
    with pytest.raises(InputError, match=r"mlp_bias = true.*which a mixtral cannot have"):
        run(moe, biased, tmp_path / "out2")
    with pytest.raises(InputError, match="it is a mixtral model, not a llama"):
        run(moe, moe, tmp_path / "out3")


def test_branches_of_any_dense_kind_that_the_moe_can_be_made_of_join(tokenizer: Path, tmp_path: Path) -> None:
    _, moe, _ = build(tmp_path, "qwen2_moe", tokenizer)
    with pytest.raises(InputError, match="rope_parameters"):
        run(moe, Family(tmp_path, "mixtral", tokenizer).dense("far", 9, rope_theta=7.0), tmp_path / "no")
    llama = Family(tmp_path, "mixtral", tokenizer).dense("llama", 9)
    assert run(moe, llama, tmp_path / "yes")["num_experts"] == 4


def test_models_that_can_take_no_expert_are_refused(mixtral: tuple[Family, Artifact, Artifact], tmp_path: Path) -> None:
    family, moe, law = mixtral
    with pytest.raises(InputError, match="has an expert made from 'code' already"):
        run(moe, law, tmp_path / "a", domain="code")
    with pytest.raises(InputError, match="is a dense model"):
        run(law, law, tmp_path / "b")
    grouped = Family(tmp_path / "glm", "glm4_moe", family.tokenizer)
    seed, code = grouped.dense("seed", 0), grouped.dense("code", 1)
    branches = {"a": code, "b": code, "c": code}
    moe = grouped.mixed("moe", branches, seed, selection="loss_free", num_groups=2, num_groups_per_tok=2)
    with pytest.raises(InputError, match=r"4 experts of .* stand in 2 groups, which 5 do not divide into"):
        run(moe, code, tmp_path / "c")


def test_no_branch_has_the_layers_of_olmoe(mixtral: tuple[Family, Artifact, Artifact], tmp_path: Path) -> None:
    family, _, law = mixtral
    config = OlmoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2)
    save_model(AutoModelForCausalLM.from_config(config), tmp_path / "olmoe", tokenizer_from=family.tokenizer)
    with pytest.raises(InputError, match="No branch can join a olmoe model"):
        run(artifact(tmp_path / "olmoe"), law, tmp_path / "out")


def test_experts_that_lie_elsewhere_than_the_layout_says_are_refused(
    mixtral: tuple[Family, Artifact, Artifact], tmp_path: Path
) -> None:
    _, moe, law = mixtral
    odd = artifact(Path(shutil.copytree(moe.path, tmp_path / "odd")))
    weights = load_file(odd.path / "model.safetensors")
    name = LAYOUTS["mixtral"].experts["up_proj"].format(layer=1, expert=2)
    weights[name.replace(".2.", ".7.")] = weights[name].clone()
    save_file(weights, odd.path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"experts\.7\.w3\.weight is none of its parts"):
        run(odd, law, tmp_path / "a")
    weights = {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in weights.items()}
    save_file(weights, odd.path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"there is no model\.layers\.0\.block_sparse_moe\.gate\.weight"):
        run(odd, law, tmp_path / "b")


def test_a_model_of_unknown_origins_takes_an_expert_and_its_config_is_kept(
    mixtral: tuple[Family, Artifact, Artifact], tmp_path: Path
) -> None:
    _, moe, law = mixtral
    foreign = artifact(Path(shutil.copytree(moe.path, tmp_path / "foreign")))
    (foreign.path / "experts.json").unlink()
    config = json.loads((foreign.path / "config.json").read_text()) | {"a_field": [1, 2]}
    (foreign.path / "config.json").write_text(json.dumps(config))
    run(foreign, law, tmp_path / "out")
    assert read_origins(tmp_path / "out") == [["", "", "", "law"]] * 2
    assert read_config(tmp_path / "out") == config | {"num_local_experts": 4}


def test_a_config_names_a_domain() -> None:
    for name in ("seed", "blend", "Law"):
        with pytest.raises(ValueError, match="domain"):
            AppendConfig(domain=name)
