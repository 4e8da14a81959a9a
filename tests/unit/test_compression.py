"""Pruning: the right experts stay, bit for bit, and the result is the full model with the others masked out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from moestro.artifacts import Artifact, Job
from moestro.compression import compress
from moestro.compression.prune import prune
from moestro.compression.saliency import CRITERIA, Contribution, measure
from moestro.config import CompressConfig
from moestro.data.tokenizer import train_bpe
from moestro.errors import InputError
from moestro.models.checkpoint import load_model, save_model, stored_dtype
from moestro.models.files import read_config, read_origins
from moestro.models.layouts import routed_experts
from moestro.models.routers import experts, num_experts, routers
from moestro.models.routing import record_routes

NAMES = ["code", "docs", "sums", "code", "seed", "sums"]
E, K = 6, 2
Build = Callable[..., Any]
Tokens = dict[str, Artifact]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(["import this"] * 4, 300).save_pretrained(folder)
    return folder


def write_moe(folder: Path, model: Any, tokenizer: Path, names: list[str] = NAMES) -> Artifact:
    origins = [names[: num_experts(model)]] * 2
    save_model(model, folder, tokenizer_from=tokenizer, origins=origins)
    return Artifact(folder, "mix", folder.name)


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    made = {}
    for number, name in enumerate(("code", "docs")):
        folder = tmp_path / f"tokens-{name}"
        folder.mkdir()
        np.save(folder / "train.npy", np.random.default_rng(number).integers(0, 320, 3000).astype(np.uint16))
        np.save(folder / "train_documents.npy", np.zeros(1, dtype=np.int64))
        made[name] = Artifact(folder, "tokens", name)
    return made


def run(model: Artifact, tokens: Tokens, out: Path, **fields: Any) -> dict[str, Any]:
    out.mkdir()
    config = CompressConfig(**{"num_experts": 3, "calibration_tokens": 1024} | fields)
    return compress(config, model=model, tokens=tokens, job=Job(out=out, scratch=out.parent))


def test_pruned_equals_the_full_model_with_the_others_masked(tiny_moe: Build, moe_kind: str) -> None:
    model, ids_BS = tiny_moe(moe_kind), torch.randint(320, (2, 40), generator=torch.Generator().manual_seed(3))
    if moe_kind == "glm4_moe grouped":  # pairs are as few as a group can have
        model = tiny_moe(moe_kind, num_experts=9)
        kept_LN = torch.tensor([[0, 2, 3, 4, 7, 8], [1, 2, 4, 5, 6, 7]])
    else:
        kept_LN = torch.tensor([[0, 2, 3], [1, 3, 5]])
    pruned = prune(model, kept_LN)
    # A router masked to the kept experts: the others must lose, whatever the token.
    for layer, router in enumerate(routers(model)):
        mask_E = torch.full((router.num_experts,), -torch.inf).index_fill(0, kept_LN[layer], 0.0)
        if hasattr(router, "e_score_correction_bias"):
            router.e_score_correction_bias += mask_E
        else:
            router.forward = masked_forward(router, mask_E)
    with torch.no_grad():
        expected, got = model(ids_BS).logits, pruned(ids_BS).logits
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)


def masked_forward(router: Any, mask_E: torch.Tensor) -> Any:
    def forward(hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits_TE = torch.nn.functional.linear(hidden_states.reshape(-1, 64), router.weight) + mask_E
        gates_TK, ids_TK = logits_TE.softmax(-1).topk(K, dim=-1)
        if getattr(router, "norm_topk_prob", True):
            gates_TK = gates_TK / gates_TK.sum(-1, keepdim=True)
        routed = (logits_TE, gates_TK, ids_TK)
        return routed[::-1] if type(router).__name__.startswith("Granite") else routed

    return forward


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mixtral", "granitemoe", "glm4_moe"])
def test_contributions_are_what_a_plain_loop_gives(kind: str, tiny_moe: Build) -> None:
    model, windows_NS = tiny_moe(kind), torch.arange(320).reshape(8, 40)
    contribution, inputs = Contribution(2, E), {}
    measure(model, windows_NS, contribution)
    for layer, block in enumerate(experts(model)):
        block.register_forward_pre_hook(lambda _, args, layer=layer: inputs.update({layer: args[0]}))
    with record_routes(model) as record:
        model.model(windows_NS)
    for layer, block in enumerate(experts(model)):
        tokens_E, gates_E, outputs_E = (torch.zeros(E, dtype=torch.float64) for _ in range(3))
        for token, x_D in enumerate(inputs[layer]):
            for expert, gate in zip(record.ids[layer][token], record.weights[layer][token], strict=True):
                first, second = (block.gate_up_proj[expert] @ x_D).chunk(2)
                output_D = block.down_proj[expert] @ (torch.nn.functional.silu(first) * second)
                tokens_E[expert] += 1
                gates_E[expert] += gate.double()
                outputs_E[expert] += (gate * output_D.norm()).double()
        assert torch.equal(contribution.tokens[layer], tokens_E)
        torch.testing.assert_close(contribution.gates[layer], gates_E, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(contribution.outputs[layer], outputs_E, rtol=1e-4, atol=1e-6)
    assert contribution.tokens.sum() == 320 * 2 * 2
    mass = 320.0 * getattr(model.config, "routed_scaling_factor", 1.0)
    torch.testing.assert_close(contribution.gates.sum(1), torch.full((2,), mass, dtype=torch.float64))


def test_criteria_rank_as_they_say() -> None:
    contribution = Contribution(1, 3)
    contribution.tokens[0] = torch.tensor([10, 2, 0])
    contribution.gates[0] = torch.tensor([1.0, 1.5, 0.0])
    contribution.outputs[0] = torch.tensor([5.0, 4.0, 0.0])
    assert {name: scores(contribution)[0].tolist() for name, scores in CRITERIA.items()} == {
        "reap": [0.5, 2.0, 0.0],
        "frequency": [10.0, 2.0, 0.0],
        "gate": [1.0, 1.5, 0.0],
    }


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_best_stay(criterion: str, tiny_moe: Build, tokenizer: Path, tokens: Tokens, tmp_path: Path) -> None:
    source = write_moe(tmp_path / "moe", tiny_moe("mixtral"), tokenizer)
    run(source, tokens, tmp_path / "out", criterion=criterion)
    report = json.loads((tmp_path / "out" / "compression.json").read_text())
    assert report["criterion"] == criterion
    for scores, kept in zip(report["scores"], report["kept"], strict=True):
        assert kept == sorted(kept)
        assert min(scores[expert] for expert in kept) >= max(s for e, s in enumerate(scores) if e not in kept)


def test_the_stage_writes_what_stays_and_leaves_the_rest_alone(
    tiny_moe: Build, moe_kind: str, tokenizer: Path, tokens: Tokens, tmp_path: Path
) -> None:
    grouped = moe_kind == "glm4_moe grouped"
    total, left = (9, 6) if grouped else (6, 4)
    source = write_moe(tmp_path / "moe", tiny_moe(moe_kind, num_experts=total), tokenizer, NAMES * 2)
    result = run(source, tokens, tmp_path / "out", num_experts=left)
    report = json.loads((tmp_path / "out" / "compression.json").read_text())
    full, pruned = load_model(source.path), load_model(tmp_path / "out", tokenizer=True)
    for layer, kept in enumerate(report["kept"]):
        assert not grouped or [expert // 3 for expert in kept] == [0, 0, 1, 1, 2, 2]
        assert read_origins(tmp_path / "out")[layer] == [(NAMES * 2)[expert] for expert in kept]
        for part in ("weight", "e_score_correction_bias") if "glm" in moe_kind else ("weight",):
            before, after = getattr(routers(full)[layer], part), getattr(routers(pruned)[layer], part)
            assert torch.equal(after, before[kept])
        for part in ("gate_up_proj", "down_proj"):
            assert torch.equal(getattr(experts(pruned)[layer], part), getattr(experts(full)[layer], part)[kept])
    routed = ("experts.gate_up_proj", "experts.down_proj", "gate.weight", "router.weight", "correction_bias")
    others = {key: value for key, value in full.state_dict().items() if not key.endswith(routed)}
    assert all(torch.equal(pruned.state_dict()[key], value) for key, value in others.items())
    assert any("shared" in key for key in others) == ("glm" in moe_kind or "qwen2" in moe_kind)
    assert routed_experts(read_config(tmp_path / "out")) == left
    per_expert = 3 * 64 * 96 + 64 + ("glm" in moe_kind)
    gone = total - left
    assert result["before"]["parameters"] - result["after"]["parameters"] == 2 * gone * per_expert
    active = result["before"]["active_parameters"] - result["after"]["active_parameters"]
    assert active == 2 * gone * (64 + ("glm" in moe_kind))
    assert result["size_ratio"] == result["before"]["size_bytes"] / result["after"]["size_bytes"] > 1.1
    assert result["kept"] == read_origins(tmp_path / "out")


def test_an_expert_that_does_nothing_goes_first(
    tiny_moe: Build, tokenizer: Path, tokens: Tokens, tmp_path: Path
) -> None:
    model = tiny_moe("mixtral")
    with torch.no_grad():
        experts(model)[0].down_proj[2] = 0
        experts(model)[1].down_proj[4] = 0
    result = run(write_moe(tmp_path / "moe", model, tokenizer), tokens, tmp_path / "out", num_experts=5)
    assert result["kept"] == [["code", "docs", "code", "seed", "sums"], ["code", "docs", "sums", "code", "sums"]]


@pytest.mark.parametrize("kind", ["qwen3_moe", "glm4_moe"])
def test_same_bytes_again_and_bfloat16_stays(
    kind: str, tiny_moe: Build, tokenizer: Path, tokens: Tokens, tmp_path: Path
) -> None:
    source = write_moe(tmp_path / "moe", tiny_moe(kind, dtype=torch.bfloat16), tokenizer)
    assert run(source, tokens, tmp_path / "first") == run(source, tokens, tmp_path / "second")
    assert stored_dtype(tmp_path / "first") == torch.bfloat16
    full, pruned = (load_model(path, dtype=torch.bfloat16) for path in (source.path, tmp_path / "first"))
    report = json.loads((tmp_path / "first" / "compression.json").read_text())
    for layer, kept in enumerate(report["kept"]):
        assert torch.equal(experts(pruned)[layer].gate_up_proj, experts(full)[layer].gate_up_proj[kept])
        for bias, pruned_bias in zip(routers(full)[layer].buffers(), routers(pruned)[layer].buffers(), strict=True):
            assert pruned_bias.dtype == torch.float32
            assert torch.equal(pruned_bias, bias[kept])
    for path in sorted((tmp_path / "first").iterdir()):
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name


def test_keeping_all_changes_nothing(
    tiny_moe: Build, moe_kind: str, tokenizer: Path, tokens: Tokens, tmp_path: Path
) -> None:
    source = write_moe(tmp_path / "moe", tiny_moe(moe_kind), tokenizer)
    run(source, tokens, tmp_path / "out", num_experts=E)
    for name in ("model.safetensors", "config.json", "experts.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source.path / name).read_bytes(), name


@pytest.mark.parametrize("num_experts", [1, 7])
def test_a_number_that_does_not_fit_is_refused(
    num_experts: int, tiny_moe: Build, tokenizer: Path, tokens: Tokens, tmp_path: Path
) -> None:
    source = write_moe(tmp_path / "moe", tiny_moe("mixtral"), tokenizer)
    with pytest.raises(InputError, match=rf"num_experts is {num_experts}; the model has 6 .* 2\. Keep between 2 and 6"):
        run(source, tokens, tmp_path / "out", num_experts=num_experts)


@pytest.mark.parametrize("num_experts", [3, 8])
def test_groups_stay_of_equal_size_and_of_two_experts_at_least(
    num_experts: int, tiny_moe: Build, tokenizer: Path, tokens: Tokens, tmp_path: Path
) -> None:
    source = write_moe(tmp_path / "moe", tiny_moe("glm4_moe grouped", num_experts=12), tokenizer, NAMES * 2)
    with pytest.raises(InputError, match=r"chooses 2, from 3 groups of equal size\. Keep 6 or 9 or 12\."):
        run(source, tokens, tmp_path / "out", num_experts=num_experts)


def test_dense_models_and_foreign_origins_are_refused(
    tiny_moe: Build, dense_fields: dict[str, Any], tokenizer: Path, tokens: Tokens, tmp_path: Path
) -> None:
    source = write_moe(tmp_path / "moe", tiny_moe("mixtral"), tokenizer)
    (source.path / "experts.json").write_text(json.dumps({"origins": [NAMES]}))
    with pytest.raises(InputError, match="belongs to another checkpoint"):
        run(source, tokens, tmp_path / "one")
    dense = AutoModelForCausalLM.from_config(LlamaConfig(**dense_fields))
    save_model(dense, tmp_path / "dense", tokenizer_from=tokenizer)
    with pytest.raises(InputError, match="no tokens"):
        run(source, {}, tmp_path / "none")
    with pytest.raises(InputError, match="no experts to prune"):
        run(Artifact(tmp_path / "dense", "seed", "dense"), tokens, tmp_path / "two")
