"""What a real vLLM server's answers add is what transformers' routing of the same tokens is."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from moestro.artifacts import Input
from moestro.data.tokenizer import train_bpe
from moestro.inference.routes import RoutingShape, returned_routing
from moestro.inference.server import ServerConfig, VllmServer
from moestro.models.checkpoint import load_model
from moestro.models.routing import record_routes
from moestro_services.gateway.deployments import Deployment
from moestro_services.gateway.expert_metrics import ExpertMetrics
from moestro_services.gateway.expert_metrics_asking import Asking
from moestro_services.gateway.expert_metrics_sampling import Sampling

PATH = "/v1/completions"
EXPERTS, LAYERS, MAX_MODEL_LEN = 8, 3, 256
DEPLOYMENT = Deployment(
    name="tiny",
    version="1",
    fingerprint="d" * 64,
    checkpoint=Input(stage="compress", fingerprint="c" * 64),
    dtype="float32",
    max_model_len=MAX_MODEL_LEN,
    created=1_700_000_000,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = train_bpe(["Question: What is 12 + 7?\nAnswer: 19\n"] * 4, 300)
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        max_position_embeddings=MAX_MODEL_LEN,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def asking(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asking]:
    config = ServerConfig(name="tiny", max_model_len=MAX_MODEL_LEN, threads=1)
    with VllmServer(checkpoint, config, log=tmp_path_factory.mktemp("log") / "vllm.log") as server:
        server.start()
        at = SimpleNamespace(url=server.url, api_key=server.api_key)
        made = Asking(lambda _: at)
        yield made
        made.close()


class Known:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def shape(self, deployment: Deployment) -> RoutingShape | None:
        return returned_routing(self.folder, deployment.max_model_len)

    def profile(self, _: Deployment) -> None:
        return None


def transformers_counts(folder: Path, parts: list[tuple[list[int], int]]) -> np.ndarray:
    """Counts [L, E] of the rows of each sequence from a row on, by transformers."""
    model = load_model(folder)
    counts_LE = np.zeros((LAYERS, EXPERTS), np.int64)
    for sequence, start in parts:
        with record_routes(model) as record, torch.no_grad():
            model(torch.tensor([sequence]))
        for layer in range(LAYERS):
            chosen = record.ids[layer][start:].flatten().cpu().numpy()
            counts_LE[layer] += np.bincount(chosen, minlength=EXPERTS)
    return counts_LE


@pytest.mark.slow
def test_counts_through_vllm_equal_transformers(checkpoint: Path, asking: Asking) -> None:
    rng = np.random.default_rng(0)
    first, second, third = (rng.integers(3, 270, size).tolist() for size in (150, 40, 17))

    def ask(**more: Any) -> tuple[bytes, bytes, list[list[int]]]:
        asked = {"model": "tiny", "max_tokens": 12, "temperature": 1.0, "seed": 1, "return_token_ids": True}
        body = json.dumps(asked | {"ignore_eos": True} | more).encode()
        answer = asking(DEPLOYMENT, PATH, body)
        return body, answer, [choice["token_ids"] for choice in json.loads(answer)["choices"]]

    with ExpertMetrics(Known(checkpoint), sampling=Sampling(share=1), ask=asking) as metrics:
        parts: list[tuple[list[int], int]] = []
        for prompts, choices in (([first], 1), ([first], 3), ([second, third], 1), ([second, third], 2)):
            prompt: Any = prompts if len(prompts) > 1 else prompts[0]
            body, answer, outputs = ask(prompt=prompt, n=choices)
            metrics.answered(DEPLOYMENT, PATH, body, answer)
            for number, output in enumerate(outputs):
                tokens = prompts[number // choices]
                if number % choices == 0:
                    parts.append(([*tokens, *output[:-1]], 0))
                elif len(prompts) == 1:
                    parts.append(([*tokens, *output[:-1]], len(tokens)))
        stream = json.dumps({"model": "tiny", "prompt": third, "stream": True, "max_tokens": 50}).encode()
        metrics.answered(DEPLOYMENT, PATH, stream, None)
        parts.append((third, 0))
        metrics.drain()
        (report,) = metrics.reports()
        assert {reason: count for reason, count in metrics.skipped().items() if count} == {}
    assert report.seen.requests == {"answer": 4, "asked_again": 1}
    np.testing.assert_array_equal(report.seen.total_LE, transformers_counts(checkpoint, parts))
