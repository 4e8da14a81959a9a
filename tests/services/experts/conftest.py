"""Experts' metrics without files and servers: what is known of a version is fixed, answers are made here."""

import base64
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from moestro.artifacts import Input
from moestro.inference.routes import RoutingShape
from moestro_services.gateway.deployments import Deployment
from moestro_services.gateway.expert_metrics import ExpertMetrics
from moestro_services.gateway.expert_metrics_known import DomainProfile
from moestro_services.gateway.expert_metrics_sampling import Sampling

SHAPE = RoutingShape(num_layers=2, num_experts=4, num_experts_per_tok=2)
PATH = "/v1/completions"
ALL = Sampling(share=1, min_tokens=1)
REQUEST = b'{"model": "assistant", "prompt": "1 + 1 ="}'


class Made:
    """Traffic that is made up, and what metrics tell of it."""

    request, path, all, shape = REQUEST, PATH, ALL, SHAPE

    @staticmethod
    def deployed(version: str = "1", name: str = "assistant") -> Deployment:
        return Deployment(
            name=name,
            version=version,
            fingerprint="d" * 64,
            checkpoint=Input(stage="compress", fingerprint="c" * 64),
            dtype="float32",
            max_model_len=512,
            created=1_700_000_000,
        )

    @staticmethod
    def routes(rows: int, *, seed: int = 0, shape: RoutingShape = SHAPE) -> np.ndarray:
        """Different experts for every row and layer."""
        keys = np.random.default_rng(seed).random((rows, shape.num_layers, shape.num_experts))
        return keys.argsort(axis=-1)[..., : shape.num_experts_per_tok].astype(np.uint8)

    @staticmethod
    def encoded(array: np.ndarray) -> str:
        stream = io.BytesIO()
        np.save(stream, array)
        return base64.b64encode(stream.getvalue()).decode()

    @staticmethod
    def answer(*choices: np.ndarray | str | None, prompt: int, output: int) -> bytes:
        """An answer whose usage tells of `prompt` and `output` tokens."""
        shown = [{"routed_experts": Made.encoded(item) if isinstance(item, np.ndarray) else item} for item in choices]
        usage = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
        return json.dumps({"object": "text_completion", "choices": shown, "usage": usage}).encode()

    @staticmethod
    def counts(*parts: np.ndarray) -> list[list[int]]:
        """Counts [layer][expert], by a loop."""
        found = [[0] * SHAPE.num_experts for _ in range(SHAPE.num_layers)]
        for row in np.concatenate(parts):
            for layer, chosen in enumerate(row):
                for expert in chosen:
                    found[layer][int(expert)] += 1
        return found

    @staticmethod
    def take(metrics: ExpertMetrics, answer: bytes | None, request: bytes = REQUEST, path: str = PATH) -> None:
        metrics.answered(Made.deployed(), path, request, answer)
        metrics.drain()

    @staticmethod
    def why(metrics: ExpertMetrics) -> dict[str, int]:
        return {reason.value: count for reason, count in metrics.skipped().items() if count}

    @staticmethod
    def samples(metrics: ExpertMetrics, name: str) -> dict[tuple[str, ...], float]:
        """The values of a series by its labels' values."""
        return {
            tuple(sample.labels.values()): sample.value
            for family in metrics.collect()
            for sample in family.samples
            if sample.name == name
        }

    @staticmethod
    def pair(first: int, second: int, rows: int) -> np.ndarray:
        """Every row of both layers chooses these two."""
        return np.tile(np.array([first, second], np.uint8), (rows, 2, 1))

    @staticmethod
    def profile(*domains: list[int]) -> DomainProfile:
        counts_DLE = np.array([[layer, layer] for layer in domains])
        names = tuple(f"domain{number}" for number in range(len(domains)))
        return DomainProfile("p" * 64, names, counts_DLE)


class Fixed:
    """What is known, without files; a `clock` that is set by hand."""

    def __init__(self, shape: RoutingShape | None = SHAPE, profile: DomainProfile | None = None) -> None:
        self.answers: tuple[RoutingShape | None, DomainProfile | None] = (shape, profile)
        self.asked: list[str] = []
        self.now = 1000.0

    def shape(self, deployment: Deployment) -> RoutingShape | None:
        self.asked.append(f"shape of {deployment.label}")
        return self.answers[0]

    def profile(self, deployment: Deployment) -> DomainProfile | None:
        self.asked.append(f"profile of {deployment.label}")
        return self.answers[1]


@pytest.fixture
def known() -> Fixed:
    return Fixed()


@pytest.fixture(scope="session")
def made() -> type[Made]:
    return Made


Build = Callable[..., ExpertMetrics]


@pytest.fixture
def build(known: Fixed) -> Iterator[Build]:
    built = []

    def make(sampling: Sampling = ALL, **more: Any) -> ExpertMetrics:
        built.append(ExpertMetrics(known, sampling=sampling, clock=lambda: known.now, **more))
        return built[-1]

    yield make
    for metrics in built:
        metrics.close()
