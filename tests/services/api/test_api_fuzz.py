"""schemathesis against the OpenAPI document: whatever is sent, the answer is one that the document foresees.

Seeded: the same cases in every run. Names, ids and fingerprints are drawn from those that are there as well as made up.
"""

import time
from collections import Counter
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
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

ADMIN = {"Authorization": "Bearer admin"}
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
PASSED_ON = {"/v1/completions", "/v1/chat/completions"}
"""What is answered there is vLLM's business; here it is a stand-in's, which takes anything."""


def known_values(api: Any, fingerprint: str) -> dict[str, list[str]]:
    """What is there, by the name of a path's parameter."""
    return {
        "name": ["assistant", "small"],
        "version": ["1", "2", "3"],
        "fingerprint": [fingerprint[:8], "mix", "seed", "deploy"],
        "run_id": ["latest", "20260102"],
        "id": [one.id for one in api.runs.summaries(limit=10)],
    }


def fuzz(api: Any, fingerprint: str, *, cases_each: int) -> Counter[int]:
    """Send cases to every operation, as many well-formed ones as ill-formed; how often each status was answered."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", api.app, headers=ADMIN)
    answered: Counter[int] = Counter()
    known = known_values(api, fingerprint)
    bodies = {"config": "small", "deployment": fingerprint}
    for found in schema.get_all_operations():
        operation = found.ok()
        names = [parameter.name for parameter in operation.path_parameters]
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            own = {name: known[name] for name in names if name in known}
            _fuzz_one(operation, mode, own, bodies, cases_each, answered)
    return answered


def _fuzz_one(
    operation: Any,
    mode: GenerationMode,
    known: dict[str, list[str]],
    bodies: dict[str, str],
    cases: int,
    answered: Counter[int],
) -> None:
    checks = list(CHECKS)
    if mode == GenerationMode.NEGATIVE and operation.path not in PASSED_ON:
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
        began = time.monotonic()
        response = case.call(headers=ADMIN)
        assert time.monotonic() - began < SECONDS_PER_CASE, case.as_curl_command()
        answered[response.status_code] += 1
        case.validate_response(response, checks=checks, headers=ADMIN)
        if response.status_code != FORESEEN_SERVER_ERROR:
            case.validate_response(response, checks=[not_a_server_error])

    if operation.as_strategy(mode).is_empty:
        return  # no case of that mode is possible: nothing there that could be wrong
    run()


@pytest.fixture
def filled(api: Any, admin: Any, deployment_fingerprint: str) -> Any:
    """Versions of a model, a config, and a lifecycle that has ended."""
    for _ in range(3):
        admin.post("/api/models/assistant/versions", json={"deployment": deployment_fingerprint})
    api.configured()
    identity = admin.post("/api/lifecycles", json={"config": "small"}).json()["id"]
    admin.get(f"/api/lifecycles/{identity}/events")
    return api


def test_a_hundred_cases(filled: Any, deployment_fingerprint: str) -> None:
    answered = fuzz(filled, deployment_fingerprint, cases_each=3)
    assert answered.total() >= 100
    assert {200, 400, 404} <= set(answered)


@pytest.mark.slow
def test_a_few_thousand_cases(filled: Any, deployment_fingerprint: str) -> None:
    answered = fuzz(filled, deployment_fingerprint, cases_each=50)
    assert answered.total() >= 2000
    assert {200, 201, 202, 204, 400, 404, 409} <= set(answered)
