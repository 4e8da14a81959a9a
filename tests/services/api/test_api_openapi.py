"""The OpenAPI document: valid, complete, and saying what is answered."""

from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from moestro_services.gateway.app import Parts, create_app
from moestro_services.gateway.openapi import describe

METHODS = {"get", "post", "delete", "put", "patch"}
CHANGING = {"post", "delete"}
OPEN = {"/health", "/ready"}


@pytest.fixture
def document(api: Any) -> dict[str, Any]:
    made: dict[str, Any] = api.assembled.described()
    return made


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method in METHODS & set(methods):
            yield path, method, methods[method]


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for inner in value.values():
            yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


def test_every_operation_has_a_name_a_tag_and_words(document: dict[str, Any]) -> None:
    names = [operation["operationId"] for _, _, operation in operations(document)]
    assert sorted(names) == sorted(set(names))
    assert all(name.isidentifier() and name.islower() for name in names)
    known = {tag["name"] for tag in document["tags"]}
    for path, _, operation in operations(document):
        assert set(operation["tags"]) <= known, path
        assert operation["summary"], path
        assert operation.get("description") or path.startswith("/v1"), path


def test_every_reference_leads_somewhere_and_every_schema_is_one(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    for reference in references(document):
        assert reference.removeprefix("#/components/schemas/") in schemas, reference
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)
    assert "HTTPValidationError" not in schemas


def test_refusals_are_this_projects_own(document: dict[str, Any]) -> None:
    for path, method, operation in operations(document):
        responses = operation["responses"]
        assert "422" not in responses
        if operation.get("security") == []:
            assert path in OPEN
            continue
        assert {"400", "401", "403", "429", "503"} <= set(responses), path
        kind = "OpenAIError" if path.startswith("/v1") else "ErrorResponse"
        for status in set(responses) & {"400", "401", "403", "404", "409", "429", "503"}:
            schema = responses[status]["content"]["application/json"]["schema"]
            assert schema == {"$ref": f"#/components/schemas/{kind}"}, (path, status)
            assert responses[status]["description"]
        assert {"408", "413", "504"} <= set(responses), path
        assert "404" in responses or "{" not in path, path
        assert method not in CHANGING or "409" in responses or path.startswith(("/v1", "/api/lifecycles/"))


def test_a_key_is_asked_for(document: dict[str, Any]) -> None:
    assert document["security"] == [{"key": []}]
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"


def test_calls_of_models_are_described(document: dict[str, Any]) -> None:
    for path, request, answer in (
        ("/v1/completions", "CompletionRequest", "Completion"),
        ("/v1/chat/completions", "ChatRequest", "ChatCompletion"),
    ):
        operation = document["paths"][path]["post"]
        body = operation["requestBody"]["content"]["application/json"]
        schemas = document["components"]["schemas"]
        assert body["schema"]["$ref"].endswith(f"/{request}")
        Draft202012Validator({**schemas[request], "components": {"schemas": schemas}}).validate(body["example"])
        assert schemas[request]["additionalProperties"] is True
        content = operation["responses"]["200"]["content"]
        assert content["application/json"]["schema"]["$ref"].endswith(f"/{answer}")
        assert "text/event-stream" in content


def test_events_are_described(document: dict[str, Any]) -> None:
    content = document["paths"]["/api/lifecycles/{id}/events"]["get"]["responses"]["200"]["content"]
    assert list(content) == ["text/event-stream"]
    data = content["text/event-stream"]["itemSchema"]["properties"]["data"]
    assert data["contentSchema"] == {"$ref": "#/components/schemas/LifecycleEvent"}
    event = document["components"]["schemas"]["LifecycleEvent"]
    assert set(event["discriminator"]["mapping"]) == {"planned", "started", "progress", "ended", "finished"}
    assert event["discriminator"]["mapping"]["planned"] in set(references(event["oneOf"]))


def test_examples_are_valid(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    shown = [(schema, example) for schema in schemas.values() for example in schema.get("examples", ())]
    assert len(shown) >= 4
    for schema, example in shown:
        Draft202012Validator({**schema, "components": {"schemas": schemas}}).validate(example)


def test_the_document_is_made_once_and_the_same_when_described_again(api: Any) -> None:
    assert api.assembled.described() is api.assembled.described()
    app = create_app(Parts(home=api.home, fleet=api.fleet))
    describe(app)
    first = app.openapi()
    describe(app)
    assert app.openapi() == first
