"""Which requests are looked at: the chosen ones that fit into the queue, streams by asking again."""

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest

from moestro.errors import ResourceError
from moestro_services.gateway.deployments import Deployment
from moestro_services.gateway.expert_metrics import ExpertMetrics
from moestro_services.gateway.expert_metrics_sampling import Sampling

Build = Callable[..., ExpertMetrics]
Fixed = Any
"""`conftest.Fixed`."""


def test_the_sample_is_the_same_for_the_same_seed_and_as_large_as_wanted() -> None:
    chosen = [number for number in range(20_000) if Sampling(share=0.1, seed=3).chooses(number)]
    assert chosen == [number for number in range(20_000) if Sampling(share=0.1, seed=3).chooses(number)]
    assert chosen != [number for number in range(20_000) if Sampling(share=0.1, seed=4).chooses(number)]
    assert len(chosen) == pytest.approx(2000, rel=0.1)
    assert set(chosen) < {number for number in range(20_000) if Sampling(share=0.2, seed=3).chooses(number)}
    assert not any(Sampling(share=0).chooses(number) for number in range(100))
    assert all(Sampling(share=1).chooses(number) for number in range(100))


def test_only_the_chosen_requests_are_counted(made: Any, build: Build) -> None:
    metrics = build(Sampling(share=0.3, seed=7, min_tokens=1))
    array = made.routes(6)
    for _ in range(40):
        metrics.answered(made.deployed(), "/v1/models", made.request, b"")  # no completion: has no number
        metrics.answered(made.deployed(), made.path, made.request, made.answer(array, prompt=4, output=3))
        metrics.drain()
    expected = sum(Sampling(share=0.3, seed=7).chooses(number) for number in range(40))
    assert metrics.reports()[0].seen.requests == {"answer": expected}


class Gate:
    """An `ask` that waits until it is let through."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.began, self.open = threading.Event(), threading.Event()

    def __call__(self, *_: object) -> bytes:
        self.began.set()
        assert self.open.wait(30)
        return self.answer


def test_a_full_queue_drops_at_once_and_counts_it(made: Any, build: Build) -> None:
    gate = Gate(made.answer(made.routes(4), prompt=4, output=1))
    metrics = build(made.all.model_copy(update={"queue_requests": 3}), ask=gate)
    metrics.answered(made.deployed(), made.path, made.request, None)
    assert gate.began.wait(30)  # the thread is at work on the stream
    for _ in range(5):
        metrics.answered(made.deployed(), made.path, made.request, made.answer(made.routes(6), prompt=4, output=3))
    assert made.why(metrics) == {"queue_full": 3}
    gate.open.set()
    metrics.drain()
    assert metrics.reports()[0].seen.requests == {"asked_again": 1, "answer": 2}
    made.take(metrics, made.answer(made.routes(6), prompt=4, output=3))
    assert metrics.reports()[0].seen.requests == {"asked_again": 1, "answer": 3}


def test_a_queue_of_too_many_bytes_is_full(made: Any, build: Build) -> None:
    body = made.answer(made.routes(6), prompt=4, output=3)
    metrics = build(made.all.model_copy(update={"queue_bytes": len(body)}))
    made.take(metrics, body)
    assert made.why(metrics) == {"queue_full": 1}


def test_what_waits_when_it_is_closed_is_dropped_and_later_requests_too(made: Any, known: Fixed) -> None:
    gate = Gate(made.answer(made.routes(4), prompt=4, output=1))
    with ExpertMetrics(known, sampling=made.all, ask=gate) as metrics:
        for _ in range(3):
            metrics.answered(made.deployed(), made.path, made.request, None)
        assert gate.began.wait(30)
        gate.open.set()
    metrics.answered(made.deployed(), made.path, made.request, made.answer(made.routes(6), prompt=4, output=3))
    assert made.why(metrics)["queue_full"] == 1


def test_a_stream_is_asked_again_for_its_prompt_alone(made: Any, build: Build) -> None:
    asked: list[tuple[str, str, Any]] = []

    def ask(deployment: Deployment, path: str, body: bytes) -> bytes:
        asked.append((deployment.label, path, json.loads(body)))
        return made.answer(array, prompt=5, output=1)

    array = made.routes(5)
    metrics = build(ask=ask)
    request = {
        "model": "assistant",
        "messages": [{"role": "user", "content": "1 + 1"}],
        "tools": [{"type": "function", "function": {"name": "sum"}}],
        "tool_choice": "required",
        "cache_salt": "own",
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_completion_tokens": 500,
        "min_tokens": 100,
        "n": 4,
        "logprobs": True,
        "request_id": "r",
    }
    made.take(metrics, None, json.dumps(request).encode(), "/v1/chat/completions")
    kept = {name: request[name] for name in ("model", "messages", "tools", "cache_salt")}
    again = kept | {"tool_choice": "none", "max_tokens": 1, "n": 1, "stream": False, "temperature": 0.0}
    assert asked == [("assistant@1", "/v1/chat/completions", again)]
    (report,) = metrics.reports()
    assert report.seen.total_LE.tolist() == made.counts(array)
    assert made.samples(metrics, "moestro_expert_sampled_requests_total") == {
        ("assistant", "1", "answer"): 0,
        ("assistant", "1", "asked_again"): 1,
    }
    made.take(metrics, None, json.dumps({"model": "assistant", "prompt": ["x", "y"], "stream": True}).encode())
    assert asked[1][2]["prompt"] == "x"


def test_streams_are_left_alone_when_the_server_is_busy_or_nobody_asks(made: Any, build: Build) -> None:
    asked: list[bytes] = []

    def ask(deployment: Deployment, path: str, body: bytes) -> bytes:
        asked.append(body)
        raise ResourceError("no")

    running = 2
    metrics = build(ask=ask, in_flight=lambda _: running)
    made.take(metrics, None)
    assert made.why(metrics) == {"busy": 1}
    running = 1
    made.take(metrics, None)
    assert made.why(metrics) == {"busy": 1, "ask_failed": 1}
    assert len(asked) == 1
    silent = build()
    made.take(silent, None)
    assert made.why(silent) == {"not_asked": 1}
