"""Figures of the window: what the counts say, against the profile, in bounded memory."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from moestro_services.gateway.expert_metrics import PROFILE_SECONDS, ExpertMetrics
from moestro_services.gateway.expert_metrics_known import DomainProfile
from moestro_services.gateway.expert_metrics_sampling import Sampling

Build = Callable[..., ExpertMetrics]
Fixed = Any
"""`conftest.Fixed`."""


def test_the_window_slides_and_totals_stay(made: Any, build: Build, known: Fixed) -> None:
    metrics = build(Sampling(share=1, min_tokens=1, window_seconds=60, window_steps=6))
    arrays = [made.routes(6, seed=seed) for seed in range(3)]
    for array in arrays:
        made.take(metrics, made.answer(array, prompt=4, output=3))
        known.now += 30
    # 1000, 1030 and 1060 s were counted; at 1090 the window begins after 1039.
    (report,) = metrics.reports()
    assert report.seen.window.counts_LE.tolist() == made.counts(arrays[2])
    assert report.seen.total_LE.tolist() == made.counts(*arrays)
    known.now += 10_000
    (report,) = metrics.reports()
    assert (report.seen.window.tokens, report.figures) == (0, None)
    assert report.seen.window.counts_LE.sum() == 0


def test_a_thin_window_has_no_figures(made: Any, build: Build) -> None:
    metrics = build(Sampling(share=1, min_tokens=12))
    made.take(metrics, made.answer(made.routes(6), prompt=4, output=3))
    assert made.samples(metrics, "moestro_expert_load_variation") == {}
    assert made.samples(metrics, "moestro_expert_dead") == {}
    assert made.samples(metrics, "moestro_expert_window_tokens") == {("assistant", "1"): 6}
    made.take(metrics, made.answer(made.routes(6), prompt=4, output=3))
    assert len(made.samples(metrics, "moestro_expert_load_variation")) == 2


def test_figures_are_what_the_counts_say(made: Any, build: Build) -> None:
    metrics = build()
    made.take(metrics, made.answer(np.concatenate([made.pair(0, 1, 6), made.pair(0, 2, 2)]), prompt=7, output=2))
    labels = [("assistant", "1", "0"), ("assistant", "1", "1")]
    load = np.array([8, 6, 2, 0])
    expected = {
        "moestro_expert_load_variation": load.std() / load.mean(),
        "moestro_expert_max_violation": 1.0,
        "moestro_expert_dead": 1,
        "moestro_expert_entropy_ratio": -sum(p * np.log(p) for p in load[:3] / 16) / np.log(4),
    }
    for name, value in expected.items():
        assert made.samples(metrics, name) == pytest.approx(dict.fromkeys(labels, value)), name
    tokens = made.samples(metrics, "moestro_expert_tokens_total")
    assert [tokens["assistant", "1", "1", str(expert)] for expert in range(4)] == load.tolist()
    assert made.samples(metrics, "moestro_expert_sampled_tokens_total") == {("assistant", "1"): 8}
    assert made.samples(metrics, "moestro_expert_drift_bits") == {}


def test_a_change_of_the_domain_mix_is_no_drift_and_a_change_of_routing_is(
    made: Any, build: Build, known: Fixed
) -> None:
    known.answers = (made.shape, made.profile([100, 100, 0, 0], [0, 100, 100, 0]))
    metrics = build(Sampling(share=1, min_tokens=1, window_seconds=10))
    mostly_first = np.concatenate([made.pair(0, 1, 9), made.pair(1, 2, 3)])
    made.take(metrics, made.answer(mostly_first, prompt=10, output=3))
    assert max(made.samples(metrics, "moestro_expert_drift_bits").values()) == pytest.approx(0, abs=1e-4)
    assert made.samples(metrics, "moestro_expert_domain_share") == pytest.approx(
        {("assistant", "1", "domain0"): 0.75, ("assistant", "1", "domain1"): 0.25}, abs=1e-2
    )
    known.now += 100
    made.take(metrics, made.answer(made.pair(0, 3, 12), prompt=10, output=3))
    assert min(made.samples(metrics, "moestro_expert_drift_bits").values()) > 0.3


def test_a_profile_that_comes_later_is_found_and_one_of_another_model_ignored(
    made: Any, build: Build, known: Fixed
) -> None:
    metrics = build()
    body = made.answer(made.routes(6), prompt=4, output=3)
    made.take(metrics, body)
    made.take(metrics, body)
    assert known.asked == ["shape of assistant@1", "profile of assistant@1"]
    known.answers = (made.shape, DomainProfile("p" * 64, ("code",), np.ones((1, 2, 9), np.int64)))
    known.now += PROFILE_SECONDS
    made.take(metrics, body)
    assert metrics.reports()[0].seen.profile is None
    known.answers = (made.shape, made.profile([1, 1, 1, 1]))
    known.now += PROFILE_SECONDS
    made.take(metrics, body)
    assert metrics.reports()[0].seen.profile is not None
    assert made.samples(metrics, "moestro_expert_drift_bits")


def test_large_models_have_no_series_per_expert(made: Any, build: Build) -> None:
    metrics = build(Sampling(share=1, min_tokens=1, max_series=7))
    made.take(metrics, made.answer(made.routes(6), prompt=4, output=3))
    assert made.samples(metrics, "moestro_expert_tokens_total") == {}
    assert len(made.samples(metrics, "moestro_expert_load_variation")) == 2


def test_versions_are_apart_and_the_ones_longest_unseen_are_forgotten(made: Any, build: Build) -> None:
    metrics = build(Sampling(share=1, min_tokens=1, max_versions=2))
    for version in ("1", "2", "1", "3"):
        metrics.answered(
            made.deployed(version), made.path, made.request, made.answer(made.routes(6), prompt=4, output=3)
        )
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


def test_what_is_kept_does_not_grow_with_what_is_seen(made: Any, build: Build, known: Fixed) -> None:
    known.answers = (made.shape, made.profile([1, 1, 1, 1], [3, 1, 1, 1]))
    metrics = build(Sampling(share=1, min_tokens=1, max_versions=3, window_seconds=60))
    sizes = []
    for number in range(1500):
        version = str(number % 3 if number < 500 else number)  # ever new versions in the end
        metrics.answered(
            made.deployed(version),
            made.path,
            made.request,
            made.answer(made.routes(6, seed=number), prompt=4, output=3),
        )
        known.now += 1
        if number % 50 == 49:
            metrics.drain()
            generated = sum(len(family.samples) for family in metrics.collect())
            sizes.append((generated, held(metrics._versions), held(metrics._reports)))
    metrics.drain()
    assert max(sizes) == min(sizes), sizes
    assert (metrics._waiting, metrics._waiting_bytes) == (0, 0)


def test_the_collector_speaks_prometheus(made: Any, build: Build) -> None:
    metrics = build()
    registry = CollectorRegistry()
    registry.register(metrics)
    with pytest.raises(ValueError, match="Duplicated"):
        registry.register(build())
    made.take(metrics, made.answer(made.routes(6), prompt=4, output=3))
    text = generate_latest(registry).decode()
    assert 'moestro_expert_sampled_tokens_total{model="assistant",version="1"} 6.0' in text
    assert 'moestro_expert_skipped_requests_total{reason="queue_full"} 0.0' in text
    assert {family.name for family in metrics.describe()} == {family.name for family in metrics.collect()}
