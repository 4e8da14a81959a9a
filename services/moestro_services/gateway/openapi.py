"""The gateway's OpenAPI document, complete enough for generated clients.

FastAPI describes what it checks; `describe` adds what it cannot know: who may ask, what the door refuses, what
passes through to vLLM, and what server-sent events hold. Mistakes are answered with 400, never with FastAPI's 422.
"""

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import models_json_schema

from moestro_services.gateway.errors import in_v1
from moestro_services.gateway.lifecycles_schemas import LifecycleEvent
from moestro_services.gateway.openapi_v1 import REQUESTS, STREAM_EXAMPLE, OpenAIError
from moestro_services.gateway.schemas import ErrorResponse

REF = "#/components/schemas/{model}"
OPEN_PATHS = {"/health", "/ready"}
METHODS = {"get", "put", "post", "delete", "patch", "head", "options"}
DESCRIPTION = """Models under `/v1` as OpenAI's API has them, answered by vLLM; everything else of a Moestro home under
`/api`. Requests bear a key, `Authorization: Bearer KEY`, with the scope `infer` for `/v1`, `read` for reading `/api`
and `/metrics`, `admin` for changing anything. On this machine alone a gateway may be open without keys."""
TAGS = {
    "models": "Asking models; their versions, and who gets traffic.",
    "lifecycles": "Starting, following and stopping lifecycles.",
    "runs": "Lifecycle runs and their stage runs.",
    "artifacts": "What stages made, from what, and what experts specialised in.",
    "deployments": "Checkpoints that passed their gate.",
    "traffic": "What the traffic tells of a served model's experts.",
    "audit": "Who changed what.",
    "state": "The gateway itself.",
}
OPERATION_IDS = {
    ("/v1/models", "get"): "list_served_models",
    ("/v1/models/{model}", "get"): "read_served_model",
    ("/v1/completions", "post"): "create_completion",
    ("/v1/chat/completions", "post"): "create_chat_completion",
    ("/health", "get"): "read_health",
    ("/ready", "get"): "read_readiness",
    ("/metrics", "get"): "read_metrics",
}
DOOR = (400, 401, 403, 408, 413, 429, 503, 504)
"""What a request may meet before it reaches its route, or because of the time that takes."""
REASONS = {
    400: "The request is malformed; the message names the field.",
    401: "There is no key, or it is wrong or revoked.",
    403: "The key has not the scope.",
    404: "There is no such thing.",
    408: "The body did not come in time.",
    409: "Something is in the way: a lifecycle that runs, nothing to roll back to, a gate that refuses.",
    413: "The body is too large.",
    429: "The key's limit is reached.",
    503: "For now nothing can be done about it; ask again.",
    504: "The answer took longer than the key allows.",
}
STREAM_ITEM = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
RETRY = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "string"}}}
EVENTS_EXAMPLE = """retry: 2000

id: 97
event: planned
data: {"event": "planned", "run": "20260102-030400-abcd", "name": "quickstart", "steps": ["corpus code", "seed"]}

id: 139
event: started
data: {"event": "started", "step": "corpus code"}

: nothing new

"""

Operation = dict[str, Any]


def describe(app: FastAPI) -> None:
    """Let `app` give the complete document, at /openapi.json and by `app.openapi()`. Call it when it has its routes."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            plain = get_openapi(
                title="Moestro",
                version=version("moestro"),
                description=" ".join(DESCRIPTION.split()),
                routes=app.routes,
                tags=[{"name": name, "description": text} for name, text in TAGS.items()],
            )
            app.openapi_schema = _completed(plain)
        return app.openapi_schema

    app.openapi_schema = None
    setattr(app, "openapi", document)  # noqa: B010  (FastAPI's own way; a plain assignment to a method has no type)


def _completed(document: dict[str, Any]) -> dict[str, Any]:
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    schemas.update(_further_schemas())
    components["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer", "description": "A key as `moestro keys create` shows it once."}
    }
    document["security"] = [{"key": []}]
    for path, method, operation in _operations(document):
        operation["operationId"] = OPERATION_IDS.get((path, method), operation["operationId"])
        if path in REQUESTS:
            _describe_model_call(path, operation)
        if operation["operationId"] == "follow_lifecycle":
            _describe_events(operation)
        _add_refusals(path, operation)
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    return document


def _operations(document: dict[str, Any]) -> Iterator[tuple[str, str, Operation]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            if method in METHODS:
                yield path, method, operation


def _further_schemas() -> dict[str, Any]:
    """Of what FastAPI does not know: calls of models, refusals, events."""
    kinds: list[tuple[type[BaseModel], Any]] = [(kind, "validation") for pair in REQUESTS.values() for kind in pair[:2]]
    kinds += [(OpenAIError, "validation"), (ErrorResponse, "validation")]
    found = dict(models_json_schema(kinds, ref_template=REF)[1].get("$defs", {}))
    event = TypeAdapter(LifecycleEvent).json_schema(mode="serialization", ref_template=REF)
    found.update(event.pop("$defs"))
    return found | {"LifecycleEvent": {"title": "LifecycleEvent", **event}}


def _describe_model_call(path: str, operation: Operation) -> None:
    request, answer, example = REQUESTS[path]
    body = {"schema": {"$ref": REF.format(model=request.__name__)}, "example": example}
    operation["requestBody"] = {"required": True, "content": {"application/json": body}}
    content = {
        "application/json": {"schema": {"$ref": REF.format(model=answer.__name__)}},
        "text/event-stream": {"itemSchema": STREAM_ITEM, "example": STREAM_EXAMPLE},
    }
    operation["responses"]["200"] = {"description": "vLLM's answer; events with `stream`.", "content": content}


def _describe_events(operation: Operation) -> None:
    """As FastAPI describes streams that it makes itself: `itemSchema` says what each event is."""
    content = {"$ref": REF.format(model="LifecycleEvent")}
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": content}
    operation["responses"]["200"] = {
        "description": "Events until the lifecycle has ended, the last one `finished`; comments while nothing happens. "
        "Each event's data is a `LifecycleEvent`; with its id in Last-Event-ID one goes on after it.",
        "content": {
            "text/event-stream": {
                "itemSchema": {
                    "type": "object",
                    "required": ["id", "event", "data"],
                    "properties": {"id": {"type": "string"}, "event": {"type": "string"}, "data": data},
                },
                "example": EVENTS_EXAMPLE,
            }
        },
    }


def _add_refusals(path: str, operation: Operation) -> None:
    responses: dict[str, Any] = operation["responses"]
    responses.pop("422", None)
    if path in OPEN_PATHS:
        operation["security"] = []
        return
    kind = OpenAIError if in_v1(path) else ErrorResponse
    further = (404, 409) if path in REQUESTS else (404,) if path == "/v1/models/{model}" else ()
    for status in (*DOOR, *further):
        responses.setdefault(str(status), {})
    for code, response in responses.items():
        if code.isdecimal() and int(code) >= 400:
            response["description"] = REASONS[int(code)]
            response["content"] = {"application/json": {"schema": {"$ref": REF.format(model=kind.__name__)}}}
            if code in {"429", "503"}:
                response["headers"] = RETRY
    operation["responses"] = dict(sorted(responses.items()))
