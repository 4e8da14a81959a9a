"""schemathesis against the OpenAPI document: whatever is sent, the answer is one that the document foresees.

Seeded: the same cases in every run. Names, ids and fingerprints are drawn from those that are there as well as made up.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

FORESEEN_SERVER_ERROR = 503
SECONDS_PER_CASE = 20.0
CHECKS = [
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
    ignored_auth,
]


def known_values(api: Any, fingerprint: str) -> dict[str, list[str]]:
    """What is there, by the name of a path's parameter."""
    return {
        "name": ["assistant", "small"],
        "model": ["assistant", "assistant@champion"],
        "version": ["1", "2", "3"],
        "fingerprint": [fingerprint[:8], "mix", "seed", "deploy"],
        "run_id": ["latest", "20260102"],
        "id": [one.id for one in api.runs.summaries(limit=10)],
    }


def fuzz(api: Any, url: str, fingerprint: str, *, cases_each: int) -> Counter[int]:
    """Send cases to every operation, as many well-formed ones as ill-formed; how often each status was answered."""
    sent = {"headers": {"Authorization": f"Bearer {api.secrets['admin']}"}, "timeout": SECONDS_PER_CASE}
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", **sent)
    answered: Counter[int] = Counter()
    known = known_values(api, fingerprint)
    bodies = {"config": "small", "deployment": fingerprint, "model": "assistant"}
    for found in schema.get_all_operations():
        operation = found.ok()
        names = [parameter.name for parameter in operation.path_parameters]
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            own = {name: known[name] for name in names if name in known}
            with requests.Session() as session:
                _fuzz_one(sent | {"session": session}, operation, mode, own, bodies, cases_each, answered)
    return answered


def _fuzz_one(
    sent: dict[str, Any],
    operation: Any,
    mode: GenerationMode,
    known: dict[str, list[str]],
    bodies: dict[str, str],
    cases: int,
    answered: Counter[int],
) -> None:
    checks = list(CHECKS)
    if mode == GenerationMode.NEGATIVE:
        checks.append(negative_data_rejection)

    @seed(20260102)
    @settings(
        max_examples=cases,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        chosen = {name: data.draw(st.sampled_from(values)) for name, values in known.items() if values}
        own = mode == GenerationMode.POSITIVE and chosen and data.draw(st.booleans())
        case = data.draw(operation.as_strategy(mode, path_parameters=chosen if own else None))
        if mode == GenerationMode.POSITIVE and isinstance(case.body, dict) and data.draw(st.booleans()):
            case.body |= {name: value for name, value in bodies.items() if name in case.body}
        response = case.call(**sent)
        answered[response.status_code] += 1
        case.validate_response(response, checks=checks, headers=sent["headers"], transport_kwargs=sent)
        if response.status_code != FORESEEN_SERVER_ERROR:
            case.validate_response(response, checks=[not_a_server_error])

    if operation.as_strategy(mode).is_empty:
        return  # no case of that mode is possible: nothing there that could be wrong
    try:
        run()
    except Unsatisfiable:
        assert mode == GenerationMode.NEGATIVE


@pytest.fixture
def filled(api: Any, admin: Any, deployed: Callable[..., str]) -> Any:
    """Versions of a model that is served, a config, and a lifecycle that has ended."""
    for letter in "abc":
        admin.post("/api/models/assistant/versions", json={"deployment": deployed(letter)})
    api.wait_for({"1": "serving"})
    api.configured()
    identity = admin.post("/api/lifecycles", json={"config": "small"}).json()["id"]
    admin.get(f"/api/lifecycles/{identity}/events")
    return api


def test_a_hundred_cases(filled: Any, url: str, deployment_fingerprint: str) -> None:
    answered = fuzz(filled, url, deployment_fingerprint, cases_each=3)
    assert answered.total() >= 100
    assert {200, 400, 404} <= set(answered)


@pytest.mark.slow
def test_a_few_thousand_cases(filled: Any, url: str, admin: Any, deployment_fingerprint: str) -> None:
    answered = fuzz(filled, url, deployment_fingerprint, cases_each=50)
    assert answered.total() >= 2000
    assert {200, 201, 202, 204, 400, 404, 409} <= set(answered)
    metrics = admin.get("/metrics").text
    for path in ("/v1/completions", "/v1/chat/completions"):
        assert f'{{model="assistant",route="{path}",status="200",version="1"}}' in metrics
    assert 'moestro_expert_skipped_requests_total{reason="error"} 0.0' in metrics
