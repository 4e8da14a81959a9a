"""Recipes that leave the function as it is do so in every layout: logits against the dense model or another mix.

Moestro's own experts add float32 products in another order, so the comparisons run transformers' experts.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GraniteConfig, LlamaConfig, Olmo2Config, Qwen2Config, Qwen3Config

from moestro.artifacts import Artifact, Job
from moestro.config import (
    BlendedExperts,
    DivMoeExperts,
    FineGrainedExperts,
    MixConfig,
    RandomRouter,
    SparseUpcyclingExperts,
    ZeroRouter,
)
from moestro.data.tokenizer import train_bpe
from moestro.mixing import mix
from moestro.models.checkpoint import load_model, save_model
from moestro.models.routing import record_routes, replay_routes

SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
SHARED: dict[str, Any] = {"generalist": "shared"}
LOSS_FREE: dict[str, Any] = {"selection": "loss_free"}
LAYOUTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "mixtral": (LlamaConfig, {}),
    "granitemoe": (GraniteConfig, {}),
    "qwen3_moe": (Qwen3Config, {}),
    "qwen2_moe": (Qwen2Config, SHARED),
    "flex_olmo": (Olmo2Config, {}),
    "glm4_moe": (LlamaConfig, SHARED | LOSS_FREE),
}
"""By MoE architecture: the dense config class, and what asks for that architecture."""
WIDE_ROUTER = RandomRouter(std=1.0)
IDS_BS = torch.randint(320, (2, 33), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(["while True: pass"] * 4, 300).save_pretrained(folder)
    return folder


def write_dense(folder: Path, kind: Any, tokenizer: Path, seed: int = 0, **fields: Any) -> Artifact:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(kind(**SMALL | fields))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
    save_model(model, folder, tokenizer_from=tokenizer)
    return Artifact(folder, "seed", folder.name)


def run(branches: Mapping[str, Artifact], seed: Artifact, out: Path, **fields: Any) -> dict[str, Any]:
    out.mkdir()
    job = Job(out=out, scratch=out.parent)
    return mix(MixConfig(**fields), seed=seed, branches=branches, tokens={}, job=job)


def logits(folder: Path, dtype: torch.dtype = torch.float32, experts: str = "eager") -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = load_model(folder, dtype=dtype, experts=experts)(IDS_BS).logits
    return found


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("name", LAYOUTS)
def test_slices_of_identical_networks_equal_the_dense_model(name: str, tokenizer: Path, tmp_path: Path) -> None:
    kind, asked = LAYOUTS[name]
    seed = write_dense(tmp_path / "seed", kind, tokenizer)
    dense = logits(seed.path)
    for granularity in (2, 3, 4):
        experts = FineGrainedExperts(granularity=granularity)
        out = tmp_path / f"slices{granularity}"
        result = run(dict.fromkeys("abc", seed), seed, out, experts=experts, router=WIDE_ROUTER, **asked)
        assert result["architecture"] == name
        assert result["num_experts_per_tok"] == 2 * granularity
        for implementation in ("eager", "grouped_mm"):
            assert relative(logits(out, experts=implementation), dense) <= 1e-5, (granularity, implementation)


@pytest.mark.parametrize("name", LAYOUTS)
def test_slices_do_together_what_whole_experts_do(name: str, tokenizer: Path, tmp_path: Path) -> None:
    kind, asked = LAYOUTS[name]
    members = [write_dense(tmp_path / str(number), kind, tokenizer, number) for number in range(4)]
    branches = dict(zip("abc", members[1:], strict=True))
    run(branches, members[0], tmp_path / "whole", router=WIDE_ROUTER, **asked)
    run(branches, members[0], tmp_path / "fine", router=WIDE_ROUTER, experts=FineGrainedExperts(granularity=4), **asked)
    whole = logits(tmp_path / "whole")
    assert relative(logits(tmp_path / "fine"), whole) <= 1e-5
    assert relative(logits(members[0].path), whole) > 0.1


@pytest.mark.parametrize("name", LAYOUTS)
def test_few_tokens_get_slices_of_two_networks_in_bfloat16(name: str, tokenizer: Path, tmp_path: Path) -> None:
    """Where logits are bfloat16, two networks tie at the last place now and then; GLM-4's router has float32 logits."""
    kind, asked = LAYOUTS[name]
    members = [write_dense(tmp_path / str(number), kind, tokenizer, number) for number in range(4)]
    branches = dict(zip("abc", members[1:], strict=True))
    experts = FineGrainedExperts(granularity=4)
    origins = run(branches, members[0], tmp_path / "fine", router=WIDE_ROUTER, experts=experts, **asked)["experts"]
    networks_E = torch.tensor([sorted(set(origins)).index(origin) for origin in origins])
    model = load_model(tmp_path / "fine", dtype=torch.bfloat16, experts="eager")
    with torch.no_grad(), record_routes(model) as record:
        model(torch.randint(320, (64, 64), generator=torch.Generator().manual_seed(3)))
    for ids_TK in record.ids:
        chosen_TN = torch.nn.functional.one_hot(networks_E[ids_TK]).sum(1)
        share = float((chosen_TN % 4 > 0).any(dim=1).float().mean())
        assert share == 0 if name == "glm4_moe" else share < 0.02


@pytest.mark.parametrize("name", LAYOUTS)
def test_copies_of_the_seed_are_the_seed(name: str, tokenizer: Path, tmp_path: Path) -> None:
    kind, asked = LAYOUTS[name]
    seed = write_dense(tmp_path / "seed", kind, tokenizer)
    run({}, seed, tmp_path / "zero", experts=SparseUpcyclingExperts(), router=ZeroRouter(), **asked)
    run({}, seed, tmp_path / "random", experts=SparseUpcyclingExperts(), router=WIDE_ROUTER, **asked)
    for dtype in (torch.float32, torch.bfloat16):
        dense = logits(seed.path, dtype)
        assert torch.equal(logits(tmp_path / "zero", dtype), dense)
    assert relative(logits(tmp_path / "random"), logits(seed.path)) <= 1e-5


def test_all_slices_or_all_blends_of_equal_models_add_up_to_the_model(tokenizer: Path, tmp_path: Path) -> None:
    seed = write_dense(tmp_path / "seed", LlamaConfig, tokenizer)
    branches, dense = dict.fromkeys("ab", seed), logits(seed.path)
    for name, experts, chosen in (("divmoe", DivMoeExperts(slices=3), 9), ("blended", BlendedExperts(), 3)):
        fields: dict[str, Any] = {"experts": experts, "num_experts_per_tok": chosen, "router": ZeroRouter()}
        run(branches, seed, tmp_path / name, **fields)
        assert relative(logits(tmp_path / name), dense) <= 1e-5, name


@pytest.mark.parametrize("name", ["mixtral", "granitemoe", "qwen2_moe", "glm4_moe"])
def test_padding_changes_nothing(name: str, tokenizer: Path, tmp_path: Path) -> None:
    """With every token sent to one expert, the mix is the branch which that expert is."""
    kind, asked = LAYOUTS[name]
    seed = write_dense(tmp_path / "seed", kind, tokenizer)
    widths = {"a": 40, "b": 48, "c": 104}
    branches = {}
    for number, (branch, width) in enumerate(widths.items(), start=1):
        branches[branch] = write_dense(tmp_path / branch, kind, tokenizer, number, intermediate_size=width)
        model, dense = load_model(branches[branch].path), load_model(seed.path)
        rest = {key: value for key, value in dense.state_dict().items() if ".mlp." not in key}
        model.load_state_dict(rest, strict=False)
        save_model(model, branches[branch].path, tokenizer_from=tokenizer)
    run(branches, seed, tmp_path / "mix", router=WIDE_ROUTER, num_experts_per_tok=1, **asked)
    mixed = load_model(tmp_path / "mix", dtype=torch.float64, experts="eager")
    halves = load_model(seed.path, dtype=torch.float64)
    for number, branch in enumerate(widths):
        routes_TLK = torch.full((IDS_BS.numel(), 2, 1), number)
        with torch.no_grad(), replay_routes(mixed, routes_TLK):
            found = mixed(IDS_BS).logits
        alone = load_model(branches[branch].path, dtype=torch.float64)
        with torch.no_grad():
            if "generalist" in asked:
                for layer, other in zip(alone.model.layers, halves.model.layers, strict=True):
                    layer.mlp = Halves(layer.mlp, other.mlp)
            expected = alone(IDS_BS).logits
        assert relative(found, expected) <= 1e-12, branch


class Halves(torch.nn.Module):
    """The mean of two feed-forward networks: what an expert and the shared expert add up to."""

    def __init__(self, one: torch.nn.Module, other: torch.nn.Module) -> None:
        super().__init__()
        self.one, self.other = one, other

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        mean_BSD: torch.Tensor = (self.one(x_BSD) + self.other(x_BSD)) / 2
        return mean_BSD
