"""Appending: a branch joins as one more expert, and every byte that was there stays."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moestro.artifacts import Artifact, Job
from moestro.config import RemoveConfig
from moestro.mixing import remove
from moestro.models.checkpoint import load_model, read_config
from moestro.models.files import read_origins
from moestro.models.layouts import LAYOUTS
from moestro.models.routers import parameter_counts
from moestro.models.routing import record_routes
from moestro.models.weights import StoredWeights

Mixed = tuple[Any, Artifact, Artifact]
"""A family of checkpoints, a mix of it, and a branch that is not in the mix."""
Make = Callable[..., Any]
PARTS = ("gate_proj", "up_proj", "down_proj")


def artifact(folder: Path) -> Artifact:
    return Artifact(folder, "branch", folder.name)


def contents(folder: Path) -> dict[str, bytes]:
    """Every tensor's type, shape and bytes."""
    stored = StoredWeights(folder)
    return {
        name: f"{tensor.code} {tensor.shape} ".encode() + tensor.read().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in stored.items()
    }


def test_old_tensors_stay_and_the_new_expert_is_the_branchs(
    mixed_family: Mixed, run_append: Make, tmp_path: Path
) -> None:
    family, moe, law = mixed_family
    layout = LAYOUTS[family.target]
    result = run_append(moe, law, tmp_path / "out")
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


def test_what_is_appended_and_removed_leaves_no_trace(mixed_family: Mixed, run_append: Make, tmp_path: Path) -> None:
    _, moe, law = mixed_family
    run_append(moe, law, tmp_path / "more")
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
    mixed_family: Mixed, make_family: Make, run_append: Make, tmp_path: Path
) -> None:
    """A feature that is large and positive for every token, and a row that is very negative there.

    What the expert holds is then of no account, not even in the last bit. Against the old model, whose routers multiply
    by a smaller matrix, rounding is.
    """
    family, moe, law = mixed_family
    layout = LAYOUTS[family.target]
    base = artifact(Path(shutil.copytree(moe.path, tmp_path / "base")))
    weights = load_file(base.path / "model.safetensors")
    weights["model.embed_tokens.weight"][:, 0] = 50.0
    save_file(weights, base.path / "model.safetensors", {"format": "pt"})
    other = make_family(tmp_path, family.target).dense("other", 8)
    for name, branch in (("one", law), ("two", other)):
        run_append(base, branch, tmp_path / name)
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


def test_the_correction_bias_starts_at_the_mean_of_the_others(
    make_family: Make, run_append: Make, tmp_path: Path
) -> None:
    _, moe, law = make_family(tmp_path, "glm4_moe").three_mixed()
    weights = load_file(moe.path / "model.safetensors")
    name = LAYOUTS["glm4_moe"].correction_bias.format(layer=1)  # type: ignore[union-attr]
    weights[name] = torch.tensor([0.5, 0.25, 0.75])
    save_file(weights, moe.path / "model.safetensors", {"format": "pt"})
    run_append(moe, law, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")[name].tolist() == [0.5, 0.25, 0.75, 0.5]


@pytest.mark.parametrize("target", ["qwen2_moe", "glm4_moe"])
def test_beside_a_shared_expert_it_is_the_expert_that_the_mix_would_have_made(
    target: str, make_family: Make, run_append: Make, tmp_path: Path
) -> None:
    family = make_family(tmp_path, target)
    seed, code, docs, law = family.four()
    moe = family.mixed("two", {"code": code, "docs": docs}, seed, generalist="shared")
    three = family.mixed("three", {"code": code, "docs": docs, "law": law}, seed, generalist="shared")
    run_append(moe, law, tmp_path / "out")
    expected, found = contents(three.path), contents(tmp_path / "out")
    assert found.keys() == expected.keys()
    experts = [name for name in found if "experts.2." in name]
    assert len(experts) == 6
    assert all(found[name] == expected[name] for name in experts)
    run_append(moe, law, tmp_path / "whole", output_scale=1.0)
    own = load_file(law.path / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    down = LAYOUTS[target].experts["down_proj"].format(layer=0, expert=2)
    assert torch.equal(load_file(tmp_path / "whole" / "model.safetensors")[down], own)


def test_a_narrower_branch_is_padded_with_zeros(
    mixed_family: Mixed, make_family: Make, run_append: Make, tmp_path: Path
) -> None:
    family, moe, _ = mixed_family
    narrow = make_family(tmp_path, family.target).dense("narrow", 7, intermediate_size=64)
    result = run_append(moe, narrow, tmp_path / "out")
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


def test_shards_hold_the_same_tensors(mixtral_family: Mixed, run_append: Make, tmp_path: Path) -> None:
    _, moe, law = mixtral_family
    run_append(moe, law, tmp_path / "one")
    run_append(moe, law, tmp_path / "many", max_shard_bytes=100_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    assert contents(tmp_path / "one") == contents(tmp_path / "many")
    load_model(tmp_path / "many")


def test_a_model_of_unknown_origins_takes_an_expert_and_its_config_is_kept(
    mixtral_family: Mixed, run_append: Make, tmp_path: Path
) -> None:
    _, moe, law = mixtral_family
    foreign = artifact(Path(shutil.copytree(moe.path, tmp_path / "foreign")))
    (foreign.path / "experts.json").unlink()
    config = json.loads((foreign.path / "config.json").read_text()) | {"a_field": [1, 2]}
    (foreign.path / "config.json").write_text(json.dumps(config))
    run_append(foreign, law, tmp_path / "out")
    assert read_origins(tmp_path / "out") == [["", "", "", "law"]] * 2
    assert read_config(tmp_path / "out") == config | {"num_local_experts": 4}
