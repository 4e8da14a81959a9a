"""Profiles: every routing decision is counted once, and the figures mean what they say."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from moestro.artifacts import Artifact, Job
from moestro.config import ProfileConfig
from moestro.data.tokenizer import train_bpe
from moestro.errors import InputError
from moestro.models.checkpoint import load_model, save_model
from moestro.models.routers import routers
from moestro.models.routing import record_routes
from moestro.profiling import profile
from moestro.profiling.figures import dead_experts, max_violation, specialisation

ORIGINS = [["code", "docs", "sums", "seed"], ["code", "seed", "docs", "docs"]]
LENGTH = 32
Build = Callable[..., Any]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(["import this"] * 4, 300).save_pretrained(folder)
    return folder


@pytest.fixture
def write_moe(tiny_moe: Build, tokenizer: Path) -> Callable[[Path, str], Artifact]:
    def write(folder: Path, kind: str) -> Artifact:
        experts = {"num_experts": 4, "num_experts_per_tok": 3}
        if kind == "glm4_moe grouped":
            experts |= {"n_group": 2, "topk_group": 2}
        save_model(tiny_moe(kind, **experts), folder, tokenizer_from=tokenizer, origins=ORIGINS)
        return Artifact(folder, "mix", folder.name)

    return write


@pytest.fixture
def tokens(tmp_path: Path) -> dict[str, Artifact]:
    made = {}
    for number, (name, count) in enumerate({"code": 1000, "docs": 200, "sums": 20}.items()):
        folder = tmp_path / f"tokens-{name}"
        folder.mkdir()
        np.save(folder / "held_out.npy", np.random.default_rng(number).integers(0, 320, count).astype(np.uint16))
        np.save(folder / "held_out_documents.npy", np.zeros(1, dtype=np.int64))
        made[name] = Artifact(folder, "tokens", name)
    return made


def run(model: Artifact, tokens: dict[str, Artifact], out: Path) -> dict[str, Any]:
    out.mkdir()
    config = ProfileConfig(sequence_length=LENGTH, max_tokens=512)
    return profile(config, model=model, tokens=tokens, job=Job(out=out, scratch=out.parent))


def test_counts_add_up_and_match_the_routes(
    write_moe: Build, moe_kind: str, tokens: dict[str, Artifact], tmp_path: Path
) -> None:
    source = write_moe(tmp_path / "moe", moe_kind)
    result = run(source, tokens, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "routing.safetensors")
    assert set(stored) == {f"{what}/{d}" for what in ("counts", "gate_mass", "coactivation", "tokens") for d in tokens}
    assert {d: stored[f"tokens/{d}"].tolist() for d in tokens} == {"code": [512], "docs": [192], "sums": [20]}
    for domain in tokens:
        count, counts_LE, together_LEE = (stored[f"{what}/{domain}"] for what in ("tokens", "counts", "coactivation"))
        assert (counts_LE.dtype, together_LEE.dtype) == (torch.int64, torch.int64)
        assert counts_LE.sum() == count * 3 * 2
        assert torch.equal(counts_LE.sum(1), count * 3 * torch.ones(2, dtype=torch.int64))
        assert torch.equal(together_LEE.diagonal(dim1=1, dim2=2), counts_LE)
        assert torch.equal(together_LEE, together_LEE.transpose(1, 2))
        assert torch.equal(together_LEE.sum((1, 2)), count * 9 * torch.ones(2, dtype=torch.int64))
    model, ids = load_model(source.path), np.load(tokens["docs"].path / "held_out.npy").astype(np.int64)
    with record_routes(model) as record, torch.no_grad():
        model(torch.from_numpy(ids[:192]).reshape(6, LENGTH))
    for layer in range(2):
        expected_E = record.ids[layer].flatten().bincount(minlength=4)
        assert torch.equal(stored["counts/docs"][layer], expected_E)
        pair = ((record.ids[layer] == 0).any(1) & (record.ids[layer] == 2).any(1)).sum()
        assert stored["coactivation/docs"][layer, 0, 2] == pair
        mass = record.weights[layer][record.ids[layer] == 1].double().sum()
        torch.testing.assert_close(stored["gate_mass/docs"][layer, 1], mass, atol=1e-4, rtol=1e-5)
    assert (tmp_path / "out" / "experts.json").read_bytes() == (source.path / "experts.json").read_bytes()
    assert json.loads(json.dumps(result)) == result


def test_same_bytes_again(write_moe: Build, tokens: dict[str, Artifact], tmp_path: Path) -> None:
    source = write_moe(tmp_path / "moe", "mixtral")
    assert run(source, tokens, tmp_path / "first") == run(source, tokens, tmp_path / "second")
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()


def test_a_zero_router_uses_the_first_experts_only(
    write_moe: Build, tokens: dict[str, Artifact], tmp_path: Path
) -> None:
    source = write_moe(tmp_path / "moe", "mixtral")
    model = load_model(source.path)
    with torch.no_grad():
        for router in routers(model):
            router.weight.zero_()
    save_model(model, source.path, tokenizer_from=source.path)
    result = run(source, tokens, tmp_path / "out")
    assert result["dead_experts"] == 2
    assert result["max_violation"] == pytest.approx(4 / 3 - 1)


def test_figures_on_counts_made_by_hand() -> None:
    counts = {
        "code": torch.tensor([[6, 2, 0, 0], [4, 2, 1, 1]]),
        "docs": torch.tensor([[2, 6, 0, 0], [2, 2, 2, 2]]),
        "sums": torch.tensor([[4, 4, 0, 0], [2, 2, 2, 2]]),
    }
    assert dead_experts(counts) == 2
    assert max_violation(counts) == pytest.approx(12 / 6 - 1)
    found = specialisation(counts, ORIGINS)
    assert found["code"] == pytest.approx((6 / 8 * 4 + 4 / 8 * 4) / 2)
    assert found["docs"] == pytest.approx((6 / 8 * 4 + 4 / 8 * 4 / 2) / 2)
    assert found["sums"] == pytest.approx(0.0)  # pruned away in layer 1, not chosen in layer 0
    assert specialisation({"sums": counts["sums"]}, [["code"] * 4, ["seed"] * 4]) == {"sums": None}


def test_what_cannot_be_profiled_is_refused(
    write_moe: Build, dense_fields: dict[str, Any], tokenizer: Path, tokens: dict[str, Artifact], tmp_path: Path
) -> None:
    source = write_moe(tmp_path / "moe", "mixtral")
    with pytest.raises(InputError, match="no tokens"):
        run(source, {}, tmp_path / "one")
    (source.path / "experts.json").write_text('{"origins": [["code"], ["code"]]}')
    with pytest.raises(InputError, match="belongs to another checkpoint"):
        run(source, tokens, tmp_path / "two")
    dense = AutoModelForCausalLM.from_config(LlamaConfig(**dense_fields))
    save_model(dense, tmp_path / "dense", tokenizer_from=tokenizer)
    with pytest.raises(InputError, match="it has no routing"):
        run(Artifact(tmp_path / "dense", "mix", "dense"), tokens, tmp_path / "three")
