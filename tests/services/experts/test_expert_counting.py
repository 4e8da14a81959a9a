"""Every token is counted once, what cannot be counted is told, nothing reaches the proxy."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moestro.errors import ArtifactError
from moestro.inference.routes import RoutingShape
from moestro_services.gateway.deployments import Deployment
from moestro_services.gateway.expert_metrics import PROFILE_SECONDS, ExpertMetrics
from moestro_services.gateway.expert_metrics_sampling import Reason

Build = Callable[..., ExpertMetrics]
Fixed = Any
"""`conftest.Fixed`."""


def test_every_token_of_an_answer_is_counted(made: Any, build: Build) -> None:
    metrics = build()
    first, second = made.routes(9), made.routes(6, seed=1)
    made.take(metrics, made.answer(first, prompt=5, output=5))
    made.take(metrics, made.answer(second, prompt=4, output=3), path="/v1/chat/completions")
    (report,) = metrics.reports()
    assert report.seen.total_LE.tolist() == made.counts(first, second)
    assert report.seen.window.counts_LE.tolist() == made.counts(first, second)
    assert (report.seen.total_tokens, report.seen.requests) == (15, {"answer": 2})
    assert made.why(metrics) == {}


def test_the_prompt_of_several_choices_is_counted_once(made: Any, build: Build) -> None:
    metrics = build()
    prompt = made.routes(5)
    one, two = (np.concatenate([prompt, made.routes(rows, seed=rows)]) for rows in (3, 2))
    request = json.dumps({"model": "assistant", "prompt": "x", "n": 2}).encode()
    made.take(metrics, made.answer(one, two, prompt=5, output=7), request)
    (report,) = metrics.reports()
    assert report.seen.total_LE.tolist() == made.counts(one, two[5:])


def test_several_prompts_are_all_counted_and_with_several_choices_the_first_of_each(made: Any, build: Build) -> None:
    metrics = build()
    prompts = [made.routes(rows, seed=rows) for rows in (4, 6)]
    request = {"model": "assistant", "prompt": ["x", "y"]}
    made.take(metrics, made.answer(*prompts, prompt=9, output=3), json.dumps(request).encode())
    assert metrics.reports()[0].seen.total_LE.tolist() == made.counts(*prompts)
    four = (prompts[0], prompts[0], prompts[1], prompts[1])
    made.take(metrics, made.answer(*four, prompt=8, output=8), json.dumps(request | {"n": 2}).encode())
    assert metrics.reports()[0].seen.total_LE.tolist() == made.counts(*prompts, *prompts)


def test_rows_that_the_client_left_out_are_not_missed(made: Any, build: Build) -> None:
    metrics = build()
    request = {"model": "assistant", "prompt": "x", "routed_experts_prompt_start": 3, "n": 2}
    choices = made.routes(4), made.routes(5, seed=1)
    made.take(metrics, made.answer(*choices, prompt=5, output=7), json.dumps(request).encode())
    assert metrics.reports()[0].seen.total_LE.tolist() == made.counts(choices[0], choices[1][2:])


def test_layers_without_experts_are_left_out(made: Any, build: Build, known: Fixed) -> None:
    shape = RoutingShape(num_layers=3, num_experts=4, num_experts_per_tok=2, dense_layers=(0,))
    known.answers = (shape, None)
    metrics = build()
    array = made.routes(6, shape=shape)
    made.take(metrics, made.answer(array, prompt=4, output=3))
    assert metrics.reports()[0].seen.total_LE.tolist() == made.counts(array[:, 1:])


TWICE = np.zeros((6, 2, 2), np.uint8)
OBJECTS = np.array([[[None]]], dtype=object)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda made: made.answer(None, prompt=4, output=3), Reason.NO_ROUTES),
        (lambda made: made.answer(made.routes(5), prompt=4, output=3), Reason.BAD_ROUTES),
        (lambda made: made.answer(made.routes(6)[:, :1], prompt=4, output=3), Reason.BAD_ROUTES),
        (lambda made: made.answer(made.routes(6) + 4, prompt=4, output=3), Reason.BAD_ROUTES),
        (lambda made: made.answer(TWICE, prompt=4, output=3), Reason.BAD_ROUTES),
        (lambda made: made.answer(OBJECTS, prompt=4, output=3), Reason.BAD_ROUTES),
        (lambda made: made.answer(np.array(3), prompt=4, output=3), Reason.BAD_ROUTES),
        (lambda made: made.answer("not base64", prompt=4, output=3), Reason.BAD_ROUTES),
        (lambda made: made.answer("AAAA", prompt=4, output=3), Reason.BAD_ROUTES),
        (lambda made: made.answer(made.encoded(made.routes(6))[:64], prompt=4, output=3), Reason.BAD_ROUTES),
        (lambda made: made.answer(prompt=4, output=3), Reason.NO_ANSWER),
        (lambda _: b'{"error": {"message": "no"}}', Reason.NO_ANSWER),
        (lambda _: b"<html>", Reason.NO_ANSWER),
        (lambda _: b"", Reason.NO_ANSWER),
    ],
)
def test_what_cannot_be_counted_is_told_by_its_reason(
    made: Any, build: Build, body: Callable[[Any], bytes], reason: Reason
) -> None:
    metrics = build()
    made.take(metrics, body(made))
    assert made.why(metrics) == {reason.value: 1}
    assert made.samples(metrics, "moestro_expert_skipped_requests_total")[reason.value,] == 1
    good = made.routes(6)
    made.take(metrics, made.answer(good, prompt=4, output=3))
    assert metrics.reports()[0].seen.total_LE.tolist() == made.counts(good)


def test_odd_numbers_of_choices_and_strange_requests_are_refused(made: Any, build: Build) -> None:
    metrics = build()
    made.take(metrics, made.answer(*[made.routes(3)] * 3, prompt=2, output=6), b'{"n": 2}')
    assert made.why(metrics) == {"bad_routes": 1}
    for request in (b"[]", b"{", b'{"n": "many"}'):
        made.take(metrics, made.answer(made.routes(6), prompt=4, output=3), request)
    assert made.why(metrics) == {"bad_routes": 1, "no_answer": 3}


def test_steered_requests_do_not_count(made: Any, build: Build) -> None:
    metrics = build()
    request = {"model": "assistant", "prompt": "x", "vllm_xargs": {"moestro_profile": "calm"}}
    made.take(metrics, made.answer(made.routes(6), prompt=4, output=3), json.dumps(request).encode())
    assert made.why(metrics) == {"steered": 1}
    made.take(
        metrics,
        made.answer(made.routes(6), prompt=4, output=3),
        json.dumps(request | {"vllm_xargs": {"own": 1}}).encode(),
    )
    assert metrics.reports()[0].seen.total_tokens == 6


def test_a_model_without_routing_is_looked_up_once(made: Any, build: Build, known: Fixed) -> None:
    known.answers = (None, None)
    metrics = build()
    for _ in range(3):
        made.take(metrics, made.answer(None, prompt=4, output=3))
    assert made.why(metrics) == {"no_routing": 3}
    assert known.asked == ["shape of assistant@1"]
    assert metrics.reports() == ()


def test_a_lookup_that_fails_is_told_and_tried_again(made: Any, build: Build, known: Fixed, monkeypatch: Any) -> None:
    def gone(_: Deployment) -> None:
        raise ArtifactError("gone")

    metrics = build()
    with monkeypatch.context() as patched:
        patched.setattr(known, "shape", gone)
        made.take(metrics, made.answer(made.routes(6), prompt=4, output=3))
    assert made.why(metrics) == {"lost": 1}
    made.take(metrics, made.answer(made.routes(6), prompt=4, output=3))
    assert metrics.reports()[0].seen.total_tokens == 6


def test_a_lookup_that_goes_on_failing_is_logged_when_its_reason_changes(
    made: Any, build: Build, known: Fixed, monkeypatch: Any, caplog: Any
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
                made.take(metrics, made.answer(made.routes(6), prompt=4, output=3))
        return [record.getMessage() for record in caplog.records]

    assert fails("shape") == ["Experts of assistant@1: gone"]
    assert fails("shape") == ["Experts of assistant@1: damaged"]
    for _ in range(2):
        assert fails("profile") == ["Experts of assistant@1: no profile"]
        known.now += PROFILE_SECONDS
        made.take(metrics, made.answer(made.routes(6), prompt=4, output=3))  # the lookup does not fail
    assert (list(reasons), made.why(metrics)) == ([], {"lost": 8})


def test_a_defect_is_counted_and_logged_and_the_thread_goes_on(
    made: Any, build: Build, known: Fixed, monkeypatch: Any, caplog: Any
) -> None:
    def broken(_: Deployment) -> None:
        raise ZeroDivisionError("a defect")

    metrics = build()
    with monkeypatch.context() as patched:
        patched.setattr(known, "shape", broken)
        made.take(metrics, made.answer(made.routes(6), prompt=4, output=3))
    assert made.why(metrics) == {"error": 1}
    assert "a defect" in caplog.text
    made.take(metrics, made.answer(made.routes(6), prompt=4, output=3))
    assert metrics.reports()[0].seen.total_tokens == 6
