"""Checkpoints that would become another model without a word: second heads, NaN, draft layers, types not told."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moestro.artifacts import Artifact, Job
from moestro.config import AppendConfig, MixConfig, RemoveConfig
from moestro.errors import InputError
from moestro.mixing import append, mix, remove
from moestro.models.checkpoint import load_model
from moestro.models.compare import check_same_kind
from moestro.models.files import WEIGHTS, read_config

Write = Callable[..., Path]
HEAD = "lm_head.weight"
GATE, UP = "model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
GLM: dict[str, Any] = {"generalist": "shared", "selection": "loss_free"}
DRAFT = "model.layers.2."


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, write_dense: Write) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: write_dense(root / name, number) for number, name in enumerate(("seed", "code", "docs", "law"))}


def changed(
    source: Path,
    folder: Path,
    change: Callable[[dict[str, torch.Tensor]], object] = lambda _weights: None,
    **config: Any,
) -> Path:
    """A copy with other weights, and other config fields; None takes one out."""
    shutil.copytree(source, folder)
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    fields = {name: value for name, value in (read_config(folder) | config).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def artifact(folder: Path) -> Artifact:
    return Artifact(folder, "any", folder.name)


def mixed(out: Path, seed: Path, branches: Mapping[str, Path], **fields: Any) -> dict[str, Any]:
    out.mkdir()
    config = MixConfig.model_validate({"router": {"type": "random"}} | fields)
    found = {name: artifact(folder) for name, folder in branches.items()}
    return mix(config, seed=artifact(seed), branches=found, tokens={}, job=Job(out=out, scratch=out.parent))


def appended(out: Path, model: Path, branch: Path, **fields: Any) -> dict[str, Any]:
    out.mkdir()
    config = AppendConfig.model_validate({"domain": "law", "router": {"type": "random"}} | fields)
    job = Job(out=out, scratch=out.parent)
    return append(config, model=artifact(model), branch=artifact(branch), tokens={}, job=job)


def removed(out: Path, model: Path, *experts: str | int) -> dict[str, Any]:
    out.mkdir()
    return remove(RemoveConfig(experts=experts), model=artifact(model), job=Job(out=out, scratch=out.parent))


def put(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda weights: weights[name].view(-1)[777:778].fill_(value)


def with_head(weights: dict[str, torch.Tensor], change: float) -> None:
    weights[HEAD] = weights["model.embed_tokens.weight"].clone()
    weights[HEAD][-1, -1] += change


def test_a_second_head_beside_a_tied_one_is_named(write_dense: Write, tmp_path: Path) -> None:
    seed = write_dense(tmp_path / "tied", 0, tie_word_embeddings=True)
    same = changed(seed, tmp_path / "same", lambda weights: with_head(weights, 0.0))
    other = changed(seed, tmp_path / "other", lambda weights: with_head(weights, 1e-3))
    assert mixed(tmp_path / "out", same, {"code": same, "docs": seed})["architecture"] == "mixtral"
    assert HEAD not in load_file(tmp_path / "out" / WEIGHTS)
    for number, (first, branches) in enumerate([(other, {"code": seed}), (seed, {"code": seed, "docs": other})]):
        with pytest.raises(InputError) as raised:
            mixed(tmp_path / f"refused{number}", first, branches)
        named = "seed" if first == other else "docs"
        assert f"{named}: tie_word_embeddings is true, and it has a second head" in str(raised.value)
        assert "set tie_word_embeddings to false" in raised.value.hint
        assert "code: " not in raised.value.message
    with pytest.raises(InputError, match="second head"):
        mixed(tmp_path / "copies", other, {}, experts={"type": "sparse_upcycling"})
    mixed(tmp_path / "mended", *mended(other, tmp_path))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        one, two = (load_model(folder, experts="eager")(ids).logits for folder in (other, tmp_path / "mended"))
    torch.testing.assert_close(two, one)


def mended(model: Path, root: Path) -> tuple[Path, dict[str, Path]]:
    """As the error says: what transformers computes of `model`, and a branch like it."""
    seed = changed(model, root / "untied", tie_word_embeddings=False)
    return seed, {"code": seed}


def test_what_trainers_leave_in_a_config_is_no_difference(
    models: dict[str, Path], write_dense: Write, tmp_path: Path
) -> None:
    """The result has the seed's; what special tokens are is told with the way out."""
    branch = write_dense(tmp_path / "branch", 1, pad_token_id=1, max_position_embeddings=512)
    config = json.loads((branch / "config.json").read_text())
    (branch / "config.json").write_text(json.dumps(config | {"unsloth_version": "1"}))
    common = check_same_kind(models["seed"], {"code": branch})
    assert (common.config.pad_token_id, common.config.max_position_embeddings) == (0, 2048)
    (branch / "config.json").write_text(json.dumps(config | {"eos_token_id": [0, 5]}))
    with pytest.raises(InputError, match=r"eos_token_id is \[0, 5\].*mix.unify_vocabulary: true"):
        check_same_kind(models["seed"], {"code": branch})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_never_published(
    dtype: torch.dtype, value: float, write_dense: Write, tmp_path: Path
) -> None:
    seed, good = (write_dense(tmp_path / name, number, dtype=dtype) for number, name in enumerate(("seed", "good")))
    bad = changed(good, tmp_path / "bad", put(GATE, value))
    told = r"bad: model\.layers\.1\.mlp\.gate_proj\.weight holds NaN or infinity"
    kinds: dict[str, Any] = {
        "copied": {},
        "sliced": {"experts": {"type": "fine_grained"}},
        "drawn": {"experts": {"type": "drop_upcycling", "of": "branches", "ratio": 1.0}},
        "coupled": {"router": {"type": "erc", "steps": 1}},
    }
    for name, fields in kinds.items():
        with pytest.raises(InputError, match=told):
            mixed(tmp_path / name, seed, {"code": good, "docs": bad}, **fields)
        assert not (tmp_path / name / "config.json").exists()
    mixed(tmp_path / "moe", seed, {"code": good})
    with pytest.raises(InputError, match=told):
        appended(tmp_path / "more", tmp_path / "moe", bad)


@pytest.mark.parametrize("method", ["mean", "ties", "dare"])
def test_merged_weights_that_are_not_finite_are_named(method: str, models: dict[str, Path], tmp_path: Path) -> None:
    bad = changed(models["docs"], tmp_path / "bad", put(QUERY, float("nan")))
    with pytest.raises(InputError, match=r"bad: model\.layers\.0\.self_attn\.q_proj\.weight holds NaN"):
        mixed(tmp_path / "out", models["seed"], {"code": bad}, rest={"attention": {"type": method}})


def test_entries_beyond_the_type_of_the_result_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    largest = torch.finfo(torch.float32).max  # which bfloat16 rounds to infinity
    wide = changed(models["code"], tmp_path / "wide", put(UP, largest))
    with pytest.raises(InputError, match=r"up_proj of an expert made from code in layer 1 .* infinity in bfloat16"):
        mixed(tmp_path / "out", models["seed"], {"code": wide}, dtype="bfloat16")


def test_a_seed_that_computes_nan_starts_no_router(models: dict[str, Path], tmp_path: Path) -> None:
    bad = changed(models["seed"], tmp_path / "bad", put(QUERY, float("nan")))
    router = {"type": "prompts", "prompts": {"code": {"positive": ["while True"]}}}
    with pytest.raises(InputError, match=r"bad: model\.layers\.0\.self_attn\.q_proj\.weight holds NaN"):
        mixed(tmp_path / "out", bad, {"code": models["code"]}, router=router)


def test_append_and_remove_copy_nothing_that_is_not_finite(models: dict[str, Path], tmp_path: Path) -> None:
    mixed(tmp_path / "moe", models["seed"], {"code": models["code"], "docs": models["docs"]})
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    bad = changed(tmp_path / "moe", tmp_path / "bad", put(name, float("inf")))
    for run, more in ((appended, [models["law"]]), (removed, ["code"])):
        with pytest.raises(InputError, match=r"bad: model\.layers\.0\.block_sparse_moe\.experts\.1\.w2"):
            run(tmp_path / run.__name__, bad, *more)  # type: ignore[operator]
    assert removed(tmp_path / "without", bad, "docs")["num_experts"] == 2
    assert all(weight.isfinite().all() for weight in load_file(tmp_path / "without" / WEIGHTS).values())


def test_biases_of_minus_infinity_are_kept_and_the_new_one_is_the_mean_of_the_others(
    models: dict[str, Path], tmp_path: Path
) -> None:
    mixed(tmp_path / "moe", models["seed"], {name: models[name] for name in ("code", "docs")}, **GLM)
    biases = ["model.layers.0.mlp.gate.e_score_correction_bias", "model.layers.1.mlp.gate.e_score_correction_bias"]

    def change(weights: dict[str, torch.Tensor]) -> None:
        weights[biases[0]] = torch.tensor([-torch.inf, 0.25])
        weights[biases[1]] = torch.tensor([-torch.inf, -torch.inf])

    appended(tmp_path / "out", changed(tmp_path / "moe", tmp_path / "low", change), models["law"])
    made = load_file(tmp_path / "out" / WEIGHTS)
    assert made[biases[0]].tolist() == [-torch.inf, 0.25, 0.25]
    assert made[biases[1]].tolist() == [-torch.inf, -torch.inf, 0.0]


def test_layers_behind_the_last_are_left_out_and_told_of(models: dict[str, Path], tmp_path: Path) -> None:
    """GLM-4.5 has such a layer, with experts of its own."""
    branches = {name: models[name] for name in ("code", "docs", "law")}
    mixed(tmp_path / "moe", models["seed"], branches, **GLM)

    def draft(weights: dict[str, torch.Tensor]) -> None:
        last = [name for name in weights if name.startswith("model.layers.1.")]
        weights.update({name.replace("model.layers.1.", DRAFT): weights[name].clone() for name in last})
        weights[DRAFT + "eh_proj.weight"] = torch.zeros(64, 128)

    model = changed(tmp_path / "moe", tmp_path / "drafting", draft, num_nextn_predict_layers=1)
    more = appended(tmp_path / "more", model, models["seed"], domain="math")
    fewer = removed(tmp_path / "fewer", model, "law")
    for name, result, count in (("more", more, 4), ("fewer", fewer, 2)):
        assert result["dropped_layers"] == [2]
        assert result["num_experts"] == count
        assert not any(key.startswith(DRAFT) for key in load_file(tmp_path / name / WEIGHTS))
        config = read_config(tmp_path / name)
        assert (config["num_nextn_predict_layers"], config["n_routed_experts"]) == (0, count)
        assert sum(weight.numel() for weight in load_file(tmp_path / name / WEIGHTS).values()) == result["parameters"]
        load_model(tmp_path / name)
    assert removed(tmp_path / "plain", tmp_path / "moe", "law")["dropped_layers"] == []
    assert "num_nextn_predict_layers" in read_config(tmp_path / "plain")


def test_a_config_without_a_type_has_that_of_its_weights(write_dense: Write, tmp_path: Path) -> None:
    seed, code = (
        write_dense(tmp_path / name, number, dtype=torch.bfloat16) for number, name in enumerate(("told", "code"))
    )

    def norms(weights: dict[str, torch.Tensor]) -> None:
        weights.update({name: weight.float() for name, weight in weights.items() if "norm" in name})

    silent = changed(seed, tmp_path / "silent", norms, dtype=None)
    branch = changed(code, tmp_path / "branch", norms)
    mixed(tmp_path / "out", silent, {"code": branch})
    assert {weight.dtype for weight in load_file(tmp_path / "out" / WEIGHTS).values()} == {torch.bfloat16}
    assert read_config(tmp_path / "out")["dtype"] == "bfloat16"


def test_double_precision_becomes_single(write_dense: Write, tmp_path: Path) -> None:
    seed, code = (
        write_dense(tmp_path / name, number, dtype=torch.float64) for number, name in enumerate(("seed", "code"))
    )
    mixed(tmp_path / "out", seed, {"code": code})
    made = load_file(tmp_path / "out" / WEIGHTS)
    assert {weight.dtype for weight in made.values()} == {torch.float32}
    assert read_config(tmp_path / "out")["dtype"] == "float32"
    expert = made["model.layers.1.block_sparse_moe.experts.0.w3.weight"]
    assert torch.equal(expert, load_file(code / WEIGHTS)[UP].float())
