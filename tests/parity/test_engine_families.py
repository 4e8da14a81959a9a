"""vLLM against transformers for every architecture that mixing makes, and OLMoE: log-probabilities, routes, refresh."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DeepseekV3Config

from moestro.data.tokenizer import train_bpe
from moestro.errors import InputError
from moestro.inference.engine import EngineConfig, Scored, VllmEngine
from moestro.models.checkpoint import load_model, save_model
from moestro.models.routing import record_routes
from moestro.rl.probe import trainer_logprobs

Build = Callable[..., Path]
MAX_LEN = 200


@pytest.fixture
def build(tiny_moe: Callable[..., Any], tmp_path: Path) -> Build:
    train_bpe(["some text"], 300).save_pretrained(tmp_path / "tokenizer")

    def make(kind: str, *, seed: int, **fields: Any) -> Path:
        folder = tmp_path / f"model-{seed}"
        save_model(tiny_moe(kind, seed=seed, **fields), folder, tokenizer_from=tmp_path / "tokenizer")
        return folder

    return make


def sequences() -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 320, size=size).tolist() for size in (5, 17, 64, 150)]


@torch.no_grad()
def expected(folder: Path) -> list[Scored]:
    model = load_model(folder, experts="eager")
    scored = []
    for sequence in sequences():
        with record_routes(model) as record:
            logprobs = trainer_logprobs(model, sequence, None)
            model(input_ids=torch.tensor([sequence]))
        scored.append(Scored(logprobs, record.routes().numpy()))
    return scored


def assert_equal(found: list[Scored], wanted: list[Scored]) -> None:
    for score, reference in zip(found, wanted, strict=True):
        assert np.abs(score.logprobs - reference.logprobs).max() <= 1e-4
        assert score.routes is not None
        assert reference.routes is not None
        assert np.array_equal(np.sort(score.routes, -1), np.sort(reference.routes, -1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("qwen2_moe", {"tie_word_embeddings": True}),
        ("qwen2_moe unshared", {}),
        ("qwen3_moe", {}),
        ("flex_olmo", {}),
        ("olmoe", {}),
        ("granitemoe", {"tie_word_embeddings": True}),
        ("glm4_moe grouped", {}),
        ("glm4_moe", {"first_k_dense_replace": 1}),
        ("mixtral", {"sliding_window": MAX_LEN}),
    ],
)
def test_scores_routes_and_refresh(kind: str, fields: dict[str, Any], build: Build) -> None:
    first, second = build(kind, seed=0, **fields), build(kind, seed=1, **fields)
    before, after = expected(first), expected(second)
    engine = VllmEngine(first, EngineConfig(routes=True, max_model_len=MAX_LEN))
    assert_equal(engine.score(sequences()), before)
    engine.refresh(second)
    assert_equal(engine.score(sequences()), after)
    # vLLM leaves transformers' class as it was: a model of it still loads and runs in this process.
    assert_equal(expected(second), after)
    engine.close()


def test_routes_beyond_a_window_that_all_layers_share_are_refused_before_vllm_starts(build: Build) -> None:
    folder = build("mixtral", seed=0, sliding_window=MAX_LEN - 1)
    with pytest.raises(InputError, match=r"all its layers slide over 199 positions, and sequences have up to 200"):
        VllmEngine(folder, EngineConfig(routes=True, max_model_len=MAX_LEN))


def test_a_deepseek_v3_that_vllm_would_not_load_is_refused_before_it_starts(tmp_path: Path) -> None:
    DeepseekV3Config().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has no topk_method noaux_tc, without which vLLM does not load it"):
        VllmEngine(tmp_path, EngineConfig(max_model_len=MAX_LEN))
