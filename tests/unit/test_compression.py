"""Pruning: the right experts stay, bit for bit, and the result is the full model with the others masked out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen3MoeConfig

from moestro.artifacts import Artifact, Job
from moestro.compression import compress
from moestro.compression.prune import prune
from moestro.compression.saliency import CRITERIA, Contribution, measure
from moestro.config import CompressConfig
from moestro.data.tokenizer import train_bpe
from moestro.errors import InputError
from moestro.models.checkpoint import load_model, read_origins, save_model, stored_dtype
from moestro.models.routers import experts, routers
from moestro.models.routing import record_routes

SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
}
CONFIGS = {
    "mixtral": lambda: MixtralConfig(**SMALL, intermediate_size=96, num_local_experts=5, tie_word_embeddings=True),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SMALL, moe_intermediate_size=96, num_experts=5, norm_topk_prob=True, head_dim=24
    ),
}
NAMES = ["code", "docs", "sums", "code", "seed"]


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=dtype).eval()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(["import this"] * 4, 300).save_pretrained(folder)
    return folder


def write_moe(folder: Path, model: Any, tokenizer: Path) -> Artifact:
    save_model(model, folder, tokenizer_from=tokenizer, origins=[NAMES, NAMES])
    return Artifact(folder, "mix", folder.name)


@pytest.fixture
def tokens(tmp_path: Path) -> dict[str, Artifact]:
    made = {}
    for number, name in enumerate(("code", "docs")):
        folder = tmp_path / f"tokens-{name}"
        folder.mkdir()
        np.save(folder / "train.npy", np.random.default_rng(number).integers(0, 320, 3000).astype(np.uint16))
        np.save(folder / "train_documents.npy", np.zeros(1, dtype=np.int64))
        made[name] = Artifact(folder, "tokens", name)
    return made


def run(model: Artifact, tokens: dict[str, Artifact], out: Path, **fields: Any) -> dict[str, Any]:
    out.mkdir()
    config = CompressConfig(**{"num_experts": 3, "calibration_tokens": 1024} | fields)
    return compress(config, model=model, tokens=tokens, job=Job(out=out, scratch=out.parent))


@pytest.mark.parametrize("name", CONFIGS)
def test_pruned_equals_the_full_model_with_the_others_masked(name: str) -> None:
    model, ids_BS = build(name), torch.randint(320, (2, 40), generator=torch.Generator().manual_seed(3))
    kept_LN = torch.tensor([[0, 2, 3], [1, 3, 4]])
    pruned = prune(model, kept_LN)
    # A router masked to the kept experts: its other rows must lose, whatever the token.
    for layer, router in enumerate(routers(model)):
        mask_E = torch.full((5,), -torch.inf).index_fill(0, kept_LN[layer], 0.0)
        router.forward = masked_forward(router, mask_E)
    with torch.no_grad():
        expected, got = model(ids_BS).logits, pruned(ids_BS).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def masked_forward(router: Any, mask_E: torch.Tensor) -> Any:
    def forward(hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits_TE = torch.nn.functional.linear(hidden_states.reshape(-1, 64), router.weight) + mask_E
        gates_TK, ids_TK = logits_TE.softmax(-1).topk(2, dim=-1)
        return logits_TE, gates_TK / gates_TK.sum(-1, keepdim=True), ids_TK

    return forward


@torch.no_grad()
def test_contributions_are_what_a_plain_loop_gives() -> None:
    model, windows_NS = build("mixtral"), torch.arange(320).reshape(8, 40)
    contribution, inputs = Contribution(2, 5), {}
    measure(model, windows_NS, contribution)
    for layer, block in enumerate(experts(model)):
        block.register_forward_pre_hook(lambda _, args, layer=layer: inputs.update({layer: args[0]}))
    with record_routes(model) as record:
        model.model(windows_NS)
    for layer, block in enumerate(experts(model)):
        tokens_E, gates_E, outputs_E = (torch.zeros(5, dtype=torch.float64) for _ in range(3))
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
    torch.testing.assert_close(contribution.gates.sum(1), torch.full((2,), 320.0, dtype=torch.float64))


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


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_stage_keeps_the_best_and_writes_what_it_did(
    name: str, criterion: str, tokenizer: Path, tokens: dict[str, Artifact], tmp_path: Path
) -> None:
    source = write_moe(tmp_path / "moe", build(name), tokenizer)
    result = run(source, tokens, tmp_path / "out", criterion=criterion)
    report = json.loads((tmp_path / "out" / "compression.json").read_text())
    full, pruned = load_model(source.path), load_model(tmp_path / "out", tokenizer=True)
    assert report["criterion"] == criterion
    for layer, (scores, kept) in enumerate(zip(report["scores"], report["kept"], strict=True)):
        assert kept == sorted(kept)
        assert min(scores[expert] for expert in kept) >= max(s for e, s in enumerate(scores) if e not in kept)
        assert read_origins(tmp_path / "out")[layer] == [NAMES[expert] for expert in kept]
        assert torch.equal(routers(pruned)[layer].weight, routers(full)[layer].weight[kept])
        for part in ("gate_up_proj", "down_proj"):
            assert torch.equal(getattr(experts(pruned)[layer], part), getattr(experts(full)[layer], part)[kept])
    others = {key: value for key, value in full.state_dict().items() if ".mlp." not in key}
    assert all(torch.equal(pruned.state_dict()[key], value) for key, value in others.items())
    assert pruned.config.num_experts == 3
    per_expert = 3 * 64 * 96 + 64
    assert result["before"]["parameters"] - result["after"]["parameters"] == 2 * 2 * per_expert
    assert result["before"]["active_parameters"] - result["after"]["active_parameters"] == 2 * 2 * 64
    assert result["size_ratio"] == result["before"]["size_bytes"] / result["after"]["size_bytes"] > 1.3
    assert result["kept"] == read_origins(tmp_path / "out")


def test_an_expert_that_does_nothing_goes_first(tokenizer: Path, tokens: dict[str, Artifact], tmp_path: Path) -> None:
    model = build("mixtral")
    with torch.no_grad():
        experts(model)[0].down_proj[2] = 0
        experts(model)[1].down_proj[4] = 0
    result = run(write_moe(tmp_path / "moe", model, tokenizer), tokens, tmp_path / "out", num_experts=4)
    assert result["kept"] == [["code", "docs", "code", "seed"], ["code", "docs", "sums", "code"]]


def test_same_bytes_again_and_bfloat16_stays(tokenizer: Path, tokens: dict[str, Artifact], tmp_path: Path) -> None:
    source = write_moe(tmp_path / "moe", build("qwen3_moe", torch.bfloat16), tokenizer)
    assert run(source, tokens, tmp_path / "first") == run(source, tokens, tmp_path / "second")
    assert stored_dtype(tmp_path / "first") == torch.bfloat16
    full, pruned = (load_model(path, dtype=torch.bfloat16) for path in (source.path, tmp_path / "first"))
    kept = json.loads((tmp_path / "first" / "compression.json").read_text())["kept"][0]
    assert torch.equal(experts(pruned)[0].gate_up_proj, experts(full)[0].gate_up_proj[kept])
    for path in sorted((tmp_path / "first").iterdir()):
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name


def test_keeping_all_changes_nothing(tokenizer: Path, tokens: dict[str, Artifact], tmp_path: Path) -> None:
    source = write_moe(tmp_path / "moe", build("mixtral"), tokenizer)
    run(source, tokens, tmp_path / "out", num_experts=5)
    for name in ("model.safetensors", "config.json", "experts.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source.path / name).read_bytes(), name


@pytest.mark.parametrize("num_experts", [1, 6])
def test_a_number_that_does_not_fit_is_refused(
    num_experts: int, tokenizer: Path, tokens: dict[str, Artifact], tmp_path: Path
) -> None:
    source = write_moe(tmp_path / "moe", build("mixtral"), tokenizer)
    with pytest.raises(InputError, match=f"num_experts is {num_experts}; the model has 5 experts and chooses 2"):
        run(source, tokens, tmp_path / "out", num_experts=num_experts)


def test_dense_models_and_foreign_origins_are_refused(
    tokenizer: Path, tokens: dict[str, Artifact], tmp_path: Path
) -> None:
    source = write_moe(tmp_path / "moe", build("mixtral"), tokenizer)
    (source.path / "experts.json").write_text(json.dumps({"origins": [NAMES]}))
    with pytest.raises(InputError, match="belongs to another checkpoint"):
        run(source, tokens, tmp_path / "one")
    fields = {name: value for name, value in SMALL.items() if name != "num_experts_per_tok"}
    dense = AutoModelForCausalLM.from_config(LlamaConfig(**fields, intermediate_size=96))
    save_model(dense, tmp_path / "dense", tokenizer_from=tokenizer)
    with pytest.raises(InputError, match="no tokens"):
        run(source, {}, tmp_path / "none")
    with pytest.raises(InputError, match="no experts to prune"):
        run(Artifact(tmp_path / "dense", "seed", "dense"), tokens, tmp_path / "two")
