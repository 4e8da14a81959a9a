"""How experts are made: which pieces of which models, and the weights that are written of them.

D hidden, F intermediate, S features drawn anew.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moestro.artifacts import Artifact, Job
from moestro.config import (
    BlendedExperts,
    DivMoeExperts,
    DropUpcyclingExperts,
    FineGrainedExperts,
    MixConfig,
    PromptRouter,
    Prompts,
    RandomRouter,
    SparseUpcyclingExperts,
    ZeroRouter,
)
from moestro.errors import InputError
from moestro.mixing import mix
from moestro.mixing.experts import factors
from moestro.mixing.plan import ExpertPlan, Piece
from moestro.mixing.recipes import plan_experts
from moestro.models.files import read_origins

Write = Callable[..., Artifact]
WIDTHS = {"code": 48, "docs": 48, "seed": 48}
NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
RANDOM = RandomRouter()


@pytest.fixture(scope="module")
def write(write_dense: Callable[..., Path]) -> Write:
    """Writes a dense model with networks of 48 features. Further arguments are fields of its config."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    own = {"hidden_size": 32, "intermediate_size": 48, "pad_token_id": None} | heads
    return lambda folder, seed, **fields: Artifact(write_dense(folder, seed, **own | fields), "seed", folder.name)


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory, write: Write) -> dict[str, Artifact]:
    root = tmp_path_factory.mktemp("members")
    return {name: write(root / name, number) for number, name in enumerate(WIDTHS)}


def run(members: Mapping[str, Artifact], out: Path, **fields: Any) -> dict[str, Any]:
    out.mkdir(parents=True)
    branches = {name: member for name, member in members.items() if name != "seed"}
    config = MixConfig(**{"router": RANDOM, **fields})
    return mix(config, seed=members["seed"], branches=branches, tokens={}, job=Job(out=out, scratch=out.parent))


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def network(member: Artifact, layer: int = 1) -> dict[str, Tensor]:
    stored = weights(member.path)
    return {name: stored[f"model.layers.{layer}.mlp.{name}.weight"] for name in NAMES}


def expert(mixed: Mapping[str, Tensor], number: int, layer: int = 1) -> dict[str, Tensor]:
    block = f"model.layers.{layer}.block_sparse_moe.experts.{number}"
    return {name: mixed[f"{block}.{part}.weight"] for name, part in NAMES.items()}


def rows_of(mixed: Mapping[str, Tensor], layer: int = 1) -> Tensor:
    return mixed[f"model.layers.{layer}.block_sparse_moe.gate.weight"]


def piece(of: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return {name: weight[:, start:stop] if name == "down_proj" else weight[start:stop] for name, weight in of.items()}


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in NAMES)


def test_fine_grained_experts_stand_slice_by_slice_and_share_rows() -> None:
    plan = plan_experts(MixConfig(experts=FineGrainedExperts(granularity=3)), WIDTHS)
    assert [expert.origin for expert in plan.experts] == ["code", "docs", "seed"] * 3
    assert plan.rows == ("code", "docs", "seed") * 3
    assert plan.experts[4] == ExpertPlan("docs", (Piece("docs", 16, 32),), scale=3.0)
    assert (plan.num_experts_per_tok, plan.expert_width, plan.shared) == (6, 16, None)


def test_slices_of_divmoe_stand_branch_by_branch_with_rows_of_their_own() -> None:
    plan = plan_experts(MixConfig(experts=DivMoeExperts(), generalist="shared"), WIDTHS)
    assert plan.rows == ("code/0", "code/1", "docs/0", "docs/1")
    assert plan.experts[3] == ExpertPlan("docs", (Piece("docs", 24, 48),), scale=2.0)
    assert plan.shared == ExpertPlan("seed", (Piece("seed", 0, 48),))
    assert (plan.num_experts_per_tok, plan.members) == (2, ("code", "docs", "seed"))


def test_blended_experts_hold_a_slice_of_every_model() -> None:
    plan = plan_experts(MixConfig(experts=BlendedExperts(), router=RANDOM), {"code": 48, "docs": 24, "seed": 48})
    assert plan.rows == ("blend/0", "blend/1", "blend/2")
    assert plan.experts[1].pieces == (Piece("code", 16, 32), Piece("docs", 8, 16), Piece("seed", 16, 32))
    assert (plan.experts[1].scale, plan.expert_width) == (1.0, 40)


def test_copies_of_the_seed_have_rows_of_their_own() -> None:
    for experts in (SparseUpcyclingExperts(num_experts=3), DropUpcyclingExperts(num_experts=3)):
        plan = plan_experts(MixConfig(experts=experts, router=RANDOM), {"seed": 48})
        assert plan.rows == ("seed/0", "seed/1", "seed/2")
        assert plan.members == ("seed",)


@pytest.mark.parametrize(
    ("experts", "message", "hint"),
    [
        (
            FineGrainedExperts(granularity=5),
            "of code have 48 features, which 5 slices do not divide",
            "2, 3, 4, 6, 8, 12",
        ),
        (DivMoeExperts(slices=7), "which 7 slices do not divide", "2, 3, 4, 6, 8, 12"),
        (BlendedExperts(), "of docs have 47 features, which 3 slices do not divide", "no number of slices would"),
    ],
)
def test_widths_that_do_not_divide_are_refused(experts: Any, message: str, hint: str) -> None:
    widths = WIDTHS | {"docs": 47}
    with pytest.raises(InputError, match=message) as raised:
        plan_experts(MixConfig(experts=experts, router=RANDOM), widths)
    assert hint in raised.value.hint


@pytest.mark.parametrize("scale", [0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0])
def test_an_output_is_scaled_by_two_matrices(scale: float) -> None:
    up, down = factors(scale).values()
    if (scale * 2**10).is_integer() and int(scale * 2**10).bit_count() == 1:
        assert up * down == scale
        assert {up.as_integer_ratio()[0].bit_count(), down.as_integer_ratio()[0].bit_count()} == {1}
    assert up * down == pytest.approx(scale, rel=1e-12)


def test_slices_are_the_models_own_bits(members: dict[str, Artifact], tmp_path: Path) -> None:
    run(members, tmp_path / "fine", experts=FineGrainedExperts(granularity=4))
    run(members, tmp_path / "divmoe", experts=DivMoeExperts())
    run(members, tmp_path / "third", experts=FineGrainedExperts(granularity=3))
    fine, divmoe, third = (weights(tmp_path / name) for name in ("fine", "divmoe", "third"))
    for number, (group, name) in enumerate((group, name) for group in range(4) for name in WIDTHS):
        own = piece(network(members[name]), group * 12, group * 12 + 12)
        own = own | {"up_proj": own["up_proj"] * 2, "down_proj": own["down_proj"] * 2}
        assert equal(expert(fine, number), own), (group, name)
    for number, (name, half) in enumerate((name, half) for name in WIDTHS for half in range(2)):
        own = piece(network(members[name]), half * 24, half * 24 + 24)
        assert equal(expert(divmoe, number), own | {"up_proj": own["up_proj"] * 2}), (name, half)
    own, made = piece(network(members["docs"]), 16, 32), expert(third, 4)
    assert torch.equal(made["gate_proj"], own["gate_proj"])
    for name in ("up_proj", "down_proj"):
        torch.testing.assert_close(made[name], own[name] * 3**0.5, rtol=1e-6, atol=0)
    assert torch.equal(rows_of(fine), rows_of(fine)[:3].repeat(4, 1))
    assert len({tuple(row.tolist()) for row in rows_of(divmoe)}) == 6
    assert read_origins(tmp_path / "divmoe")[1] == ["code", "code", "docs", "docs", "seed", "seed"]


def test_blended_experts_are_the_models_slices_side_by_side(members: dict[str, Artifact], tmp_path: Path) -> None:
    run(members, tmp_path / "out", experts=BlendedExperts())
    mixed = weights(tmp_path / "out")
    for number in range(3):
        parts = [piece(network(member), number * 16, number * 16 + 16) for member in members.values()]
        own = {name: torch.cat([part[name] for part in parts], 1 if name == "down_proj" else 0) for name in NAMES}
        assert equal(expert(mixed, number), own)
    assert read_origins(tmp_path / "out") == [["blend"] * 3] * 2


def test_copies_are_the_seeds_bits_and_need_no_branches(members: dict[str, Artifact], tmp_path: Path) -> None:
    experts = SparseUpcyclingExperts(num_experts=3)
    alone = run({"seed": members["seed"]}, tmp_path / "alone", experts=experts, router=ZeroRouter())
    assert alone == run(members, tmp_path / "beside", experts=experts, router=ZeroRouter())
    mixed, dense = weights(tmp_path / "alone"), weights(members["seed"].path)
    assert all(equal(expert(mixed, number), network(members["seed"])) for number in range(3))
    assert all(torch.equal(mixed[name], dense[name]) for name in dense if ".mlp." not in name)
    assert (tmp_path / "alone/model.safetensors").read_bytes() == (tmp_path / "beside/model.safetensors").read_bytes()
    assert alone["experts"] == ["seed"] * 3
    assert (alone["architecture"], alone["num_experts_per_tok"], alone["router"]) == ("mixtral", 2, "zero")
    assert alone["parameters"] == sum(weight.numel() for weight in mixed.values())
    assert alone["active_parameters"] == alone["parameters"] - 2 * 3 * 32 * 48


def test_narrower_branches_are_padded_with_zeros(members: dict[str, Artifact], write: Write, tmp_path: Path) -> None:
    widths = {"narrow": 40, "square": 32, "wide": 64}
    mixed_widths = {name: write(tmp_path / name, 7, intermediate_size=widths[name]) for name in widths}
    run({**mixed_widths, "seed": members["seed"]}, tmp_path / "out")
    mixed = weights(tmp_path / "out")
    for number, (name, width) in enumerate([*widths.items(), ("seed", 48)]):
        made = expert(mixed, number)
        assert made["gate_proj"].shape == (64, 32)
        own = network(mixed_widths.get(name, members["seed"]))
        assert equal(piece(made, 0, width), own)
        assert not any(rest.any() for rest in piece(made, width, 64).values())


def test_scaling_is_done_in_the_wider_type(write: Write, tmp_path: Path) -> None:
    seed = write(tmp_path / "seed", 0, dtype=torch.bfloat16)
    fields: dict[str, Any] = {"experts": FineGrainedExperts(granularity=3), "dtype": "float32"}
    run({"one": seed, "seed": seed}, tmp_path / "out", **fields)
    made, own = expert(weights(tmp_path / "out"), 0), piece(network(seed), 0, 16)
    assert made["down_proj"].dtype == torch.float32
    torch.testing.assert_close(made["down_proj"], own["down_proj"].float() * 3**0.5, rtol=1e-6, atol=0)


@pytest.mark.parametrize("width", [40, 64])
def test_a_layer_of_another_width_is_named(write: Write, tmp_path: Path, width: int) -> None:
    uneven = write(tmp_path / "uneven", 3)
    stored = weights(uneven.path)
    for name in NAMES:
        shape = (32, width) if name == "down_proj" else (width, 32)
        stored[f"model.layers.1.mlp.{name}.weight"] = torch.ones(shape)
    save_file(stored, uneven.path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"feed-forward networks of seed have widths \{sorted([48, width])}"):
        run({"seed": uneven}, tmp_path / "out", experts=SparseUpcyclingExperts())


def test_networks_that_cannot_be_told_apart_are_refused(members: dict[str, Artifact], tmp_path: Path) -> None:
    same = Prompts(positive=("the same for all",))
    router = PromptRouter(prompts={"code": same, "docs": same})
    with pytest.raises(InputError, match="code and docs start with equal router rows in layer 0"):
        run(members, tmp_path / "out", experts=FineGrainedExperts(), router=router, generalist="none")
    run(members, tmp_path / "whole", router=router, generalist="none")


def test_a_branch_may_not_be_called_as_an_expert_of_no_branch(members: dict[str, Artifact], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="called 'blend', like experts made of all branches"):
        run({"blend": members["code"], "seed": members["seed"]}, tmp_path / "out")


def test_fused_experts_are_put_together_from_the_same_slices(write: Write, tmp_path: Path) -> None:
    seed = write(tmp_path / "seed", 0, kind="granite")
    wide = write(tmp_path / "wide", 1, kind="granite", intermediate_size=64)
    run({"wide": wide, "seed": seed}, tmp_path / "out", experts=DivMoeExperts())
    mixed = weights(tmp_path / "out")
    gate_up = mixed["model.layers.1.block_sparse_moe.input_linear.weight"]
    down = mixed["model.layers.1.block_sparse_moe.output_linear.weight"]
    assert gate_up.shape == (4, 64, 32)
    own = piece(network(seed), 24, 48)
    made = {"gate_proj": gate_up[3, :24], "up_proj": gate_up[3, 32:56] / 2, "down_proj": down[3, :, :24]}
    assert equal(made, own)
    assert not any(padding.any() for padding in (gate_up[3, 24:32], gate_up[3, 56:], down[3, :, 24:]))
