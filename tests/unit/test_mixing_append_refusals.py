"""Appending: branches that do not fit, and models that can take no expert, are refused at once."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    OlmoeConfig,
)

from moestro.artifacts import Artifact
from moestro.config import AppendConfig
from moestro.data.tokenizer import train_bpe
from moestro.errors import InputError
from moestro.models.checkpoint import save_model
from moestro.models.layouts import LAYOUTS

Mixed = tuple[Any, Artifact, Artifact]
"""A family of checkpoints, a mix of it, and a branch that is not in the mix."""
Make = Callable[..., Any]


def artifact(folder: Path) -> Artifact:
    return Artifact(folder, "branch", folder.name)


def test_one_error_lists_all_differences(
    mixtral_family: Mixed, make_family: Make, run_append: Make, tmp_path: Path
) -> None:
    _, moe, _ = mixtral_family
    other = make_family(tmp_path, "mixtral")
    odd = other.dense(
        "odd",
        5,
        dtype=torch.bfloat16,
        num_hidden_layers=3,
        hidden_size=128,
        intermediate_size=160,
        vocab_size=330,
        rope_parameters={"rope_type": "default", "rope_theta": 77.0},
    )
    train_bpe(["something else entirely"] * 4, 300).save_pretrained(odd.path)
    with pytest.raises(InputError) as raised:
        run_append(moe, odd, tmp_path / "out")
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
    coarse = other.dense("coarse", 5, dtype=torch.bfloat16, intermediate_size=160)
    with pytest.raises(InputError) as raised:
        run_append(moe, coarse, tmp_path / "again")
    for part in (
        "160 features, the experts 96",
        "never cut: mix again",
        "its weights are bfloat16, the experts' are float32",
        "Import the branch in the model's type",
    ):
        assert part in str(raised.value), str(raised.value)
    assert not list((tmp_path / "out").iterdir())


def test_a_branch_of_another_architecture_is_refused(
    mixtral_family: Mixed, make_family: Make, run_append: Make, tmp_path: Path
) -> None:
    _, moe, _ = mixtral_family
    qwen = make_family(tmp_path / "qwen", "qwen3_moe").dense("qwen", 1)
    with pytest.raises(InputError, match="it is a qwen3 model, not a llama or mistral"):
        run_append(moe, qwen, tmp_path / "out")
    biased = make_family(tmp_path, "mixtral").dense("biased", 1, mlp_bias=True)
    with pytest.raises(InputError, match=r"mlp_bias = true.*which a mixtral cannot have"):
        run_append(moe, biased, tmp_path / "out2")
    with pytest.raises(InputError, match="it is a mixtral model, not a llama"):
        run_append(moe, moe, tmp_path / "out3")


def test_branches_of_any_dense_kind_that_the_moe_can_be_made_of_join(
    make_family: Make, run_append: Make, tmp_path: Path
) -> None:
    _, moe, _ = make_family(tmp_path, "qwen2_moe").three_mixed()
    with pytest.raises(InputError, match="rope_parameters"):
        run_append(moe, make_family(tmp_path, "mixtral").dense("far", 9, rope_theta=7.0), tmp_path / "no")
    llama = make_family(tmp_path, "mixtral").dense("llama", 9)
    assert run_append(moe, llama, tmp_path / "yes")["num_experts"] == 4


def test_models_that_can_take_no_expert_are_refused(
    mixtral_family: Mixed, make_family: Make, run_append: Make, tmp_path: Path
) -> None:
    _, moe, law = mixtral_family
    with pytest.raises(InputError, match="has an expert made from 'code' already"):
        run_append(moe, law, tmp_path / "a", domain="code")
    with pytest.raises(InputError, match="is a dense model"):
        run_append(law, law, tmp_path / "b")
    grouped = make_family(tmp_path / "glm", "glm4_moe")
    seed, code = grouped.dense("seed", 0), grouped.dense("code", 1)
    branches = {"a": code, "b": code, "c": code}
    moe = grouped.mixed("moe", branches, seed, selection="loss_free", num_groups=2, num_groups_per_tok=2)
    with pytest.raises(InputError, match=r"4 experts of .* stand in 2 groups, which 5 do not divide into"):
        run_append(moe, code, tmp_path / "c")


def test_no_branch_has_the_layers_of_olmoe(
    mixtral_family: Mixed, dense_fields: dict[str, Any], tokenizer: Path, run_append: Make, tmp_path: Path
) -> None:
    _, _, law = mixtral_family
    config = OlmoeConfig(**dense_fields, num_experts=4, num_experts_per_tok=2)
    save_model(AutoModelForCausalLM.from_config(config), tmp_path / "olmoe", tokenizer_from=tokenizer)
    with pytest.raises(InputError, match="No branch can join a olmoe model"):
        run_append(artifact(tmp_path / "olmoe"), law, tmp_path / "out")


def test_experts_that_lie_elsewhere_than_the_layout_says_are_refused(
    mixtral_family: Mixed, run_append: Make, tmp_path: Path
) -> None:
    _, moe, law = mixtral_family
    odd = artifact(Path(shutil.copytree(moe.path, tmp_path / "odd")))
    weights = load_file(odd.path / "model.safetensors")
    name = LAYOUTS["mixtral"].experts["up_proj"].format(layer=1, expert=2)
    weights[name.replace(".2.", ".7.")] = weights[name].clone()
    save_file(weights, odd.path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"experts\.7\.w3\.weight is none of its parts"):
        run_append(odd, law, tmp_path / "a")
    weights = {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in weights.items()}
    save_file(weights, odd.path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"there is no model\.layers\.0\.block_sparse_moe\.gate\.weight"):
        run_append(odd, law, tmp_path / "b")


def test_a_config_names_a_domain() -> None:
    for name in ("seed", "blend", "Law"):
        with pytest.raises(ValueError, match="domain"):
            AppendConfig(domain=name)
