"""Expert metrics: every token is counted once, what cannot be counted is told, nothing reaches the proxy."""

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from safetensors.numpy import save_file

from moestro.artifacts import Input
from moestro.errors import ArtifactError, InputError, ResourceError
from moestro.inference.routes import RoutingShape
from moestro_flows.home import Home
from moestro_services.catalog import Catalog
from moestro_services.gateway.deployments import Deployment
from moestro_services.gateway.expert_metrics import PROFILE_SECONDS, ExpertMetrics
from moestro_services.gateway.expert_metrics_known import DomainProfile, KnownAtHome, read_profile
from moestro_services.gateway.expert_metrics_sampling import Reason, Sampling

SHAPE = RoutingShape(num_layers=2, num_experts=4, num_experts_per_tok=2)
PATH = "/v1/completions"
ALL = Sampling(share=1, min_tokens=1)
REQUEST = b'{"model": "assistant", "prompt": "1 + 1 ="}'


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


Build = Callable[..., ExpertMetrics]


@pytest.fixture
def build(known: Fixed) -> Iterator[Build]:
    made = []

    def make(sampling: Sampling = ALL, **more: Any) -> ExpertMetrics:
        made.append(ExpertMetrics(known, sampling=sampling, clock=lambda: known.now, **more))
        return made[-1]

    yield make
    for metrics in made:
        metrics.close()


def routes(rows: int, *, seed: int = 0, shape: RoutingShape = SHAPE) -> np.ndarray:
    """Different experts for every row and layer."""
    keys = np.random.default_rng(seed).random((rows, shape.num_layers, shape.num_experts))
    return keys.argsort(axis=-1)[..., : shape.num_experts_per_tok].astype(np.uint8)


def encoded(array: np.ndarray) -> str:
    stream = io.BytesIO()
    np.save(stream, array)
    return base64.b64encode(stream.getvalue()).decode()


def answer(*choices: np.ndarray | str | None, prompt: int, output: int) -> bytes:
    """An answer whose usage tells of `prompt` and `output` tokens."""
    shown = [{"routed_experts": encoded(item) if isinstance(item, np.ndarray) else item} for item in choices]
    usage = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
    return json.dumps({"object": "text_completion", "choices": shown, "usage": usage}).encode()


def counts(*parts: np.ndarray) -> list[list[int]]:
    """Counts [layer][expert], by a loop."""
    made = [[0] * SHAPE.num_experts for _ in range(SHAPE.num_layers)]
    for row in np.concatenate(parts):
        for layer, chosen in enumerate(row):
            for expert in chosen:
                made[layer][int(expert)] += 1
    return made


def take(metrics: ExpertMetrics, answer: bytes | None, request: bytes = REQUEST, path: str = PATH) -> None:
    metrics.answered(deployed(), path, request, answer)
    metrics.drain()


def why(metrics: ExpertMetrics) -> dict[str, int]:
    return {reason.value: count for reason, count in metrics.skipped().items() if count}


def samples(metrics: ExpertMetrics, name: str) -> dict[tuple[str, ...], float]:
    """The values of a series by its labels' values."""
    return {
        tuple(sample.labels.values()): sample.value
        for family in metrics.collect()
        for sample in family.samples
        if sample.name == name
    }


def test_every_token_of_an_answer_is_counted(build: Build) -> None:
    metrics = build()
    first, second = routes(9), routes(6, seed=1)
    take(metrics, answer(first, prompt=5, output=5))
    take(metrics, answer(second, prompt=4, output=3), path="/v1/chat/completions")
    (report,) = metrics.reports()
    assert report.seen.total_LE.tolist() == counts(first, second)
    assert report.seen.window.counts_LE.tolist() == counts(first, second)
    assert (report.seen.total_tokens, report.seen.requests) == (15, {"answer": 2})
    assert why(metrics) == {}


def test_the_prompt_of_several_choices_is_counted_once(build: Build) -> None:
    metrics = build()
    prompt = routes(5)
    one, two = (np.concatenate([prompt, routes(rows, seed=rows)]) for rows in (3, 2))
    request = json.dumps({"model": "assistant", "prompt": "x", "n": 2}).encode()
    take(metrics, answer(one, two, prompt=5, output=7), request)
    (report,) = metrics.reports()
    assert report.seen.total_LE.tolist() == counts(one, two[5:])


def test_several_prompts_are_all_counted_and_with_several_choices_the_first_of_each(build: Build) -> None:
    metrics = build()
    prompts = [routes(rows, seed=rows) for rows in (4, 6)]
    request = {"model": "assistant", "prompt": ["x", "y"]}
    take(metrics, answer(*prompts, prompt=9, output=3), json.dumps(request).encode())
    assert metrics.reports()[0].seen.total_LE.tolist() == counts(*prompts)
    four = (prompts[0], prompts[0], prompts[1], prompts[1])
    take(metrics, answer(*four, prompt=8, output=8), json.dumps(request | {"n": 2}).encode())
    assert metrics.reports()[0].seen.total_LE.tolist() == counts(*prompts, *prompts)


def test_rows_that_the_client_left_out_are_not_missed(build: Build) -> None:
    metrics = build()
    request = {"model": "assistant", "prompt": "x", "routed_experts_prompt_start": 3, "n": 2}
    choices = routes(4), routes(5, seed=1)
    take(metrics, answer(*choices, prompt=5, output=7), json.dumps(request).encode())
    assert metrics.reports()[0].seen.total_LE.tolist() == counts(choices[0], choices[1][2:])


def test_layers_without_experts_are_left_out(build: Build, known: Fixed) -> None:
    shape = RoutingShape(num_layers=3, num_experts=4, num_experts_per_tok=2, dense_layers=(0,))
    known.answers = (shape, None)
    metrics = build()
    array = routes(6, shape=shape)
    take(metrics, answer(array, prompt=4, output=3))
    assert metrics.reports()[0].seen.total_LE.tolist() == counts(array[:, 1:])


TWICE = np.zeros((6, 2, 2), np.uint8)
OBJECTS = np.array([[[None]]], dtype=object)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (answer(None, prompt=4, output=3), Reason.NO_ROUTES),
        (answer(routes(5), prompt=4, output=3), Reason.BAD_ROUTES),
        (answer(routes(6)[:, :1], prompt=4, output=3), Reason.BAD_ROUTES),
        (answer(routes(6) + 4, prompt=4, output=3), Reason.BAD_ROUTES),
        (answer(TWICE, prompt=4, output=3), Reason.BAD_ROUTES),
        (answer(OBJECTS, prompt=4, output=3), Reason.BAD_ROUTES),
        (answer(np.array(3), prompt=4, output=3), Reason.BAD_ROUTES),
        (answer("not base64", prompt=4, output=3), Reason.BAD_ROUTES),
        (answer("AAAA", prompt=4, output=3), Reason.BAD_ROUTES),
        (answer(encoded(routes(6))[:64], prompt=4, output=3), Reason.BAD_ROUTES),
        (answer(prompt=4, output=3), Reason.NO_ANSWER),
        (b'{"error": {"message": "no"}}', Reason.NO_ANSWER),
        (b"<html>", Reason.NO_ANSWER),
        (b"", Reason.NO_ANSWER),
    ],
)
def test_what_cannot_be_counted_is_told_by_its_reason(build: Build, body: bytes, reason: Reason) -> None:
    metrics = build()
    take(metrics, body)
    assert why(metrics) == {reason.value: 1}
    assert samples(metrics, "moestro_expert_skipped_requests_total")[reason.value,] == 1
    good = routes(6)
    take(metrics, answer(good, prompt=4, output=3))
    assert metrics.reports()[0].seen.total_LE.tolist() == counts(good)


def test_odd_numbers_of_choices_and_strange_requests_are_refused(build: Build) -> None:
    metrics = build()
    take(metrics, answer(*[routes(3)] * 3, prompt=2, output=6), b'{"n": 2}')
    assert why(metrics) == {"bad_routes": 1}
    for request in (b"[]", b"{", b'{"n": "many"}'):
        take(metrics, answer(routes(6), prompt=4, output=3), request)
    assert why(metrics) == {"bad_routes": 1, "no_answer": 3}


def test_steered_requests_do_not_count(build: Build) -> None:
    metrics = build()
    request = {"model": "assistant", "prompt": "x", "vllm_xargs": {"moestro_profile": "calm"}}
    take(metrics, answer(routes(6), prompt=4, output=3), json.dumps(request).encode())
    assert why(metrics) == {"steered": 1}
    take(metrics, answer(routes(6), prompt=4, output=3), json.dumps(request | {"vllm_xargs": {"own": 1}}).encode())
    assert metrics.reports()[0].seen.total_tokens == 6


def test_a_model_without_routing_is_looked_up_once(build: Build, known: Fixed) -> None:
    known.answers = (None, None)
    metrics = build()
    for _ in range(3):
        take(metrics, answer(None, prompt=4, output=3))
    assert why(metrics) == {"no_routing": 3}
    assert known.asked == ["shape of assistant@1"]
    assert metrics.reports() == ()


def test_a_lookup_that_fails_is_told_and_tried_again(build: Build, known: Fixed, monkeypatch: Any) -> None:
    def gone(_: Deployment) -> None:
        raise ArtifactError("gone")

    metrics = build()
    with monkeypatch.context() as patched:
        patched.setattr(known, "shape", gone)
        take(metrics, answer(routes(6), prompt=4, output=3))
    assert why(metrics) == {"lost": 1}
    take(metrics, answer(routes(6), prompt=4, output=3))
    assert metrics.reports()[0].seen.total_tokens == 6


def test_a_lookup_that_goes_on_failing_is_logged_when_its_reason_changes(
    build: Build, known: Fixed, monkeypatch: Any, caplog: Any
) -> None:
    metrics = build()
    reasons = iter([*["gone"] * 2, *["damaged"] * 2, *["no profile"] * 4])

    def fail(_: Deployment) -> None:
        raise ArtifactError(next(reasons))

    def fails(lookup: str) -> list[str]:
        """What is logged while that lookup fails twice."""
        caplog.clear()
        with monkeypatch.context() as patched:
            patched.setattr(known, lookup, fail)
            for _ in range(2):
                known.now += PROFILE_SECONDS
                take(metrics, answer(routes(6), prompt=4, output=3))
        return [record.getMessage() for record in caplog.records]

    assert fails("shape") == ["Experts of assistant@1: gone"]
    assert fails("shape") == ["Experts of assistant@1: damaged"]
    for _ in range(2):
        assert fails("profile") == ["Experts of assistant@1: no profile"]
        known.now += PROFILE_SECONDS
        take(metrics, answer(routes(6), prompt=4, output=3))  # the lookup does not fail
    assert (list(reasons), why(metrics)) == ([], {"lost": 8})


def test_a_defect_is_counted_and_logged_and_the_thread_goes_on(
    build: Build, known: Fixed, monkeypatch: Any, caplog: Any
) -> None:
    def broken(_: Deployment) -> None:
        raise ZeroDivisionError("a defect")

    metrics = build()
    with monkeypatch.context() as patched:
        patched.setattr(known, "shape", broken)
        take(metrics, answer(routes(6), prompt=4, output=3))
    assert why(metrics) == {"error": 1}
    assert "a defect" in caplog.text
    take(metrics, answer(routes(6), prompt=4, output=3))
    assert metrics.reports()[0].seen.total_tokens == 6


def test_the_sample_is_the_same_for_the_same_seed_and_as_large_as_wanted() -> None:
    chosen = [number for number in range(20_000) if Sampling(share=0.1, seed=3).chooses(number)]
    assert chosen == [number for number in range(20_000) if Sampling(share=0.1, seed=3).chooses(number)]
    assert chosen != [number for number in range(20_000) if Sampling(share=0.1, seed=4).chooses(number)]
    assert len(chosen) == pytest.approx(2000, rel=0.1)
    assert set(chosen) < {number for number in range(20_000) if Sampling(share=0.2, seed=3).chooses(number)}
    assert not any(Sampling(share=0).chooses(number) for number in range(100))
    assert all(Sampling(share=1).chooses(number) for number in range(100))


def test_only_the_chosen_requests_are_counted(build: Build) -> None:
    metrics = build(Sampling(share=0.3, seed=7, min_tokens=1))
    array = routes(6)
    for _ in range(40):
        metrics.answered(deployed(), "/v1/models", REQUEST, b"")  # no completion: has no number
        metrics.answered(deployed(), PATH, REQUEST, answer(array, prompt=4, output=3))
        metrics.drain()
    expected = sum(Sampling(share=0.3, seed=7).chooses(number) for number in range(40))
    assert metrics.reports()[0].seen.requests == {"answer": expected}


class Gate:
    """An `ask` that waits until it is let through."""

    def __init__(self) -> None:
        self.began, self.open = threading.Event(), threading.Event()

    def __call__(self, *_: object) -> bytes:
        self.began.set()
        assert self.open.wait(30)
        return answer(routes(4), prompt=4, output=1)


def test_a_full_queue_drops_at_once_and_counts_it(build: Build) -> None:
    gate = Gate()
    metrics = build(ALL.model_copy(update={"queue_requests": 3}), ask=gate)
    metrics.answered(deployed(), PATH, REQUEST, None)
    assert gate.began.wait(30)  # the thread is at work on the stream
    for _ in range(5):
        metrics.answered(deployed(), PATH, REQUEST, answer(routes(6), prompt=4, output=3))
    assert why(metrics) == {"queue_full": 3}
    gate.open.set()
    metrics.drain()
    assert metrics.reports()[0].seen.requests == {"asked_again": 1, "answer": 2}
    take(metrics, answer(routes(6), prompt=4, output=3))
    assert metrics.reports()[0].seen.requests == {"asked_again": 1, "answer": 3}


def test_a_queue_of_too_many_bytes_is_full(build: Build) -> None:
    body = answer(routes(6), prompt=4, output=3)
    metrics = build(ALL.model_copy(update={"queue_bytes": len(body)}))
    take(metrics, body)
    assert why(metrics) == {"queue_full": 1}


def test_what_waits_when_it_is_closed_is_dropped_and_later_requests_too(known: Fixed) -> None:
    gate = Gate()
    with ExpertMetrics(known, sampling=ALL, ask=gate) as metrics:
        for _ in range(3):
            metrics.answered(deployed(), PATH, REQUEST, None)
        assert gate.began.wait(30)
        gate.open.set()
    metrics.answered(deployed(), PATH, REQUEST, answer(routes(6), prompt=4, output=3))
    assert why(metrics)["queue_full"] == 1


def test_a_stream_is_asked_again_for_its_prompt_alone(build: Build) -> None:
    asked: list[tuple[str, str, Any]] = []

    def ask(deployment: Deployment, path: str, body: bytes) -> bytes:
        asked.append((deployment.label, path, json.loads(body)))
        return answer(array, prompt=5, output=1)

    array = routes(5)
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
    take(metrics, None, json.dumps(request).encode(), "/v1/chat/completions")
    kept = {name: request[name] for name in ("model", "messages", "tools", "cache_salt")}
    again = kept | {"tool_choice": "none", "max_tokens": 1, "n": 1, "stream": False, "temperature": 0.0}
    assert asked == [("assistant@1", "/v1/chat/completions", again)]
    (report,) = metrics.reports()
    assert report.seen.total_LE.tolist() == counts(array)
    assert samples(metrics, "moestro_expert_sampled_requests_total") == {
        ("assistant", "1", "answer"): 0,
        ("assistant", "1", "asked_again"): 1,
    }
    take(metrics, None, json.dumps({"model": "assistant", "prompt": ["x", "y"], "stream": True}).encode())
    assert asked[1][2]["prompt"] == "x"


def test_streams_are_left_alone_when_the_server_is_busy_or_nobody_asks(build: Build) -> None:
    asked: list[bytes] = []

    def ask(deployment: Deployment, path: str, body: bytes) -> bytes:
        asked.append(body)
        raise ResourceError("no")

    running = 2
    metrics = build(ask=ask, in_flight=lambda _: running)
    take(metrics, None)
    assert why(metrics) == {"busy": 1}
    running = 1
    take(metrics, None)
    assert why(metrics) == {"busy": 1, "ask_failed": 1}
    assert len(asked) == 1
    silent = build()
    take(silent, None)
    assert why(silent) == {"not_asked": 1}


def test_the_window_slides_and_totals_stay(build: Build, known: Fixed) -> None:
    metrics = build(Sampling(share=1, min_tokens=1, window_seconds=60, window_steps=6))
    arrays = [routes(6, seed=seed) for seed in range(3)]
    for array in arrays:
        take(metrics, answer(array, prompt=4, output=3))
        known.now += 30
    # 1000, 1030 and 1060 s were counted; at 1090 the window begins after 1039.
    (report,) = metrics.reports()
    assert report.seen.window.counts_LE.tolist() == counts(arrays[2])
    assert report.seen.total_LE.tolist() == counts(*arrays)
    known.now += 10_000
    (report,) = metrics.reports()
    assert (report.seen.window.tokens, report.figures) == (0, None)
    assert report.seen.window.counts_LE.sum() == 0


def test_a_thin_window_has_no_figures(build: Build) -> None:
    metrics = build(Sampling(share=1, min_tokens=12))
    take(metrics, answer(routes(6), prompt=4, output=3))
    assert samples(metrics, "moestro_expert_load_variation") == {}
    assert samples(metrics, "moestro_expert_dead") == {}
    assert samples(metrics, "moestro_expert_window_tokens") == {("assistant", "1"): 6}
    take(metrics, answer(routes(6), prompt=4, output=3))
    assert len(samples(metrics, "moestro_expert_load_variation")) == 2


def pair(first: int, second: int, rows: int) -> np.ndarray:
    """Every row of both layers chooses these two."""
    return np.tile(np.array([first, second], np.uint8), (rows, 2, 1))


def test_figures_are_what_the_counts_say(build: Build) -> None:
    metrics = build()
    take(metrics, answer(np.concatenate([pair(0, 1, 6), pair(0, 2, 2)]), prompt=7, output=2))
    labels = [("assistant", "1", "0"), ("assistant", "1", "1")]
    load = np.array([8, 6, 2, 0])
    expected = {
        "moestro_expert_load_variation": load.std() / load.mean(),
        "moestro_expert_max_violation": 1.0,
        "moestro_expert_dead": 1,
        "moestro_expert_entropy_ratio": -sum(p * np.log(p) for p in load[:3] / 16) / np.log(4),
    }
    for name, value in expected.items():
        assert samples(metrics, name) == pytest.approx(dict.fromkeys(labels, value)), name
    tokens = samples(metrics, "moestro_expert_tokens_total")
    assert [tokens["assistant", "1", "1", str(expert)] for expert in range(4)] == load.tolist()
    assert samples(metrics, "moestro_expert_sampled_tokens_total") == {("assistant", "1"): 8}
    assert samples(metrics, "moestro_expert_drift_bits") == {}


def profile(*domains: list[int]) -> DomainProfile:
    counts_DLE = np.array([[layer, layer] for layer in domains])
    names = tuple(f"domain{number}" for number in range(len(domains)))
    return DomainProfile("p" * 64, names, counts_DLE)


def test_a_change_of_the_domain_mix_is_no_drift_and_a_change_of_routing_is(build: Build, known: Fixed) -> None:
    known.answers = (SHAPE, profile([100, 100, 0, 0], [0, 100, 100, 0]))
    metrics = build(Sampling(share=1, min_tokens=1, window_seconds=10))
    mostly_first = np.concatenate([pair(0, 1, 9), pair(1, 2, 3)])
    take(metrics, answer(mostly_first, prompt=10, output=3))
    assert max(samples(metrics, "moestro_expert_drift_bits").values()) == pytest.approx(0, abs=1e-4)
    assert samples(metrics, "moestro_expert_domain_share") == pytest.approx(
        {("assistant", "1", "domain0"): 0.75, ("assistant", "1", "domain1"): 0.25}, abs=1e-2
    )
    known.now += 100
    take(metrics, answer(pair(0, 3, 12), prompt=10, output=3))
    assert min(samples(metrics, "moestro_expert_drift_bits").values()) > 0.3


def test_a_profile_that_comes_later_is_found_and_one_of_another_model_ignored(build: Build, known: Fixed) -> None:
    metrics = build()
    body = answer(routes(6), prompt=4, output=3)
    take(metrics, body)
    take(metrics, body)
    assert known.asked == ["shape of assistant@1", "profile of assistant@1"]
    known.answers = (SHAPE, DomainProfile("p" * 64, ("code",), np.ones((1, 2, 9), np.int64)))
    known.now += PROFILE_SECONDS
    take(metrics, body)
    assert metrics.reports()[0].seen.profile is None
    known.answers = (SHAPE, profile([1, 1, 1, 1]))
    known.now += PROFILE_SECONDS
    take(metrics, body)
    assert metrics.reports()[0].seen.profile is not None
    assert samples(metrics, "moestro_expert_drift_bits")


def test_large_models_have_no_series_per_expert(build: Build) -> None:
    metrics = build(Sampling(share=1, min_tokens=1, max_series=7))
    take(metrics, answer(routes(6), prompt=4, output=3))
    assert samples(metrics, "moestro_expert_tokens_total") == {}
    assert len(samples(metrics, "moestro_expert_load_variation")) == 2


def test_versions_are_apart_and_the_ones_longest_unseen_are_forgotten(build: Build) -> None:
    metrics = build(Sampling(share=1, min_tokens=1, max_versions=2))
    for version in ("1", "2", "1", "3"):
        metrics.answered(deployed(version), PATH, REQUEST, answer(routes(6), prompt=4, output=3))
        metrics.drain()
    assert [(report.seen.deployment.version, report.seen.total_tokens) for report in metrics.reports()] == [
        ("1", 12),
        ("3", 6),
    ]


def held(thing: Any) -> int:
    """Bytes of the arrays that `thing` keeps, and the items of its collections, however deep."""
    if isinstance(thing, np.ndarray):
        return int(thing.nbytes)
    if isinstance(thing, dict):
        return len(thing) + sum(map(held, thing.values()))
    if isinstance(thing, list | tuple):
        return len(thing) + sum(map(held, thing))
    return held(vars(thing)) if type(thing).__module__.startswith("moestro") else 1


def test_what_is_kept_does_not_grow_with_what_is_seen(build: Build, known: Fixed) -> None:
    known.answers = (SHAPE, profile([1, 1, 1, 1], [3, 1, 1, 1]))
    metrics = build(Sampling(share=1, min_tokens=1, max_versions=3, window_seconds=60))
    sizes = []
    for number in range(1500):
        version = str(number % 3 if number < 500 else number)  # ever new versions in the end
        metrics.answered(deployed(version), PATH, REQUEST, answer(routes(6, seed=number), prompt=4, output=3))
        known.now += 1
        if number % 50 == 49:
            metrics.drain()
            generated = sum(len(family.samples) for family in metrics.collect())
            sizes.append((generated, held(metrics._versions), held(metrics._reports)))
    metrics.drain()
    assert max(sizes) == min(sizes), sizes
    assert (metrics._waiting, metrics._waiting_bytes) == (0, 0)


def test_the_collector_speaks_prometheus(build: Build) -> None:
    metrics = build()
    registry = CollectorRegistry()
    registry.register(metrics)
    with pytest.raises(ValueError, match="Duplicated"):
        registry.register(build())
    take(metrics, answer(routes(6), prompt=4, output=3))
    text = generate_latest(registry).decode()
    assert 'moestro_expert_sampled_tokens_total{model="assistant",version="1"} 6.0' in text
    assert 'moestro_expert_skipped_requests_total{reason="queue_full"} 0.0' in text
    assert {family.name for family in metrics.describe()} == {family.name for family in metrics.collect()}


def test_a_home_knows_how_its_checkpoints_route(built_home: Home) -> None:
    here = KnownAtHome(built_home)
    compressed = Catalog(built_home).published("compress")
    config = {"model_type": "mixtral", "num_hidden_layers": 2, "num_local_experts": 2, "num_experts_per_tok": 2}
    (compressed.path / "config.json").write_text(json.dumps(config))
    checkpoint = Input(stage="compress", fingerprint=compressed.record.fingerprint)
    deployment = Deployment(**vars(deployed()) | {"checkpoint": checkpoint})
    assert here.shape(deployment) == RoutingShape(2, 2, 2)
    found = here.profile(deployment)
    assert found is not None
    assert (found.domains, found.counts_DLE.shape) == (("code", "prose"), (2, 2, 2))
    assert found.fingerprint == Catalog(built_home).published("profile").record.fingerprint
    assert here.profile(deployed()) is None
    with pytest.raises(InputError, match="not a directory"):
        here.shape(deployed())


def test_a_profile_leaves_out_domains_without_tokens_and_must_be_readable(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not a readable profile"):
        read_profile(tmp_path, "p")
    full, empty = np.ones((2, 4), np.int64), np.zeros((2, 4), np.int64)
    save_file({"counts/a": full, "counts/b": empty, "tokens/a": np.array([4])}, tmp_path / "routing.safetensors")
    found = read_profile(tmp_path, "p")
    assert found is not None
    assert found.domains == ("a",)
    save_file({"counts/b": empty}, tmp_path / "routing.safetensors")
    assert read_profile(tmp_path, "p") is None
    (tmp_path / "routing.safetensors").write_bytes(b"no")
    with pytest.raises(ArtifactError, match="not a readable profile"):
        read_profile(tmp_path, "p")
