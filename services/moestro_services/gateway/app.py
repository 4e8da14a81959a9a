"""The gateway's FastAPI application: models under /v1, what the home holds under /api, and its own state."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from moestro.errors import MoestroError
from moestro_flows.home import Home
from moestro_services.gateway.access import Guarded
from moestro_services.gateway.deployments import Deployment
from moestro_services.gateway.errors import RETRY_AFTER_SECONDS, api_error, openai_error, refusal
from moestro_services.gateway.inventory import inventory
from moestro_services.gateway.proxy import Forwarded, read_body, upstream_client, wanted_model
from moestro_services.gateway.schemas import Health, ModelCard, ModelList, Readiness
from moestro_services.gateway.traffic import Observed, Traffic

MAX_BODY_BYTES = 4 << 20
REQUEST_SCHEMA: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"type": "object", "required": ["model"], "properties": {"model": {"type": "string"}}}
            }
        },
    }
}


def create_app(
    home: Home,
    deployments: Sequence[Deployment] = (),
    *,
    api_key: str | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
) -> FastAPI:
    """The application that answers for `deployments` and for what `home` holds.

    With `api_key` every request but /health and /ready must bear it; without one the Host header must be local.
    """

    @asynccontextmanager
    async def with_client(application: FastAPI) -> AsyncIterator[None]:
        async with upstream_client() as client:
            application.state.client = client
            yield

    app = FastAPI(title="Moestro", lifespan=with_client, docs_url=None, redoc_url=None)
    traffic = Traffic(deployments)
    _add_models(app, deployments, max_body_bytes)
    _add_state(app, deployments, traffic)
    app.include_router(inventory(home, deployments))
    _add_refusals(app)
    app.add_middleware(Guarded, key=api_key)
    app.add_middleware(Observed, traffic=traffic)
    return app


def _add_models(app: FastAPI, deployments: Sequence[Deployment], max_body_bytes: int) -> None:
    by_name = {deployment.name: deployment for deployment in deployments}

    def card(deployment: Deployment) -> ModelCard:
        return ModelCard(
            id=deployment.name,
            created=deployment.created,
            root=f"{deployment.checkpoint.stage}/{deployment.checkpoint.fingerprint}",
            max_model_len=deployment.max_model_len,
        )

    @app.get("/v1/models", tags=["models"])
    def models() -> ModelList:
        """The served models."""
        return ModelList(data=tuple(card(deployment) for deployment in deployments))

    @app.get("/v1/models/{model}", response_model=ModelCard, tags=["models"])
    def model(model: str) -> ModelCard | Response:
        """One served model."""
        return card(by_name[model]) if model in by_name else _unknown(model)

    async def forward(request: Request) -> Response:
        """Answered by the model's vLLM server; request and response are vLLM's own, streams included."""
        body = await read_body(request, max_body_bytes)
        if body is None:
            return openai_error(
                413, f"The request has more than {max_body_bytes} bytes.", headers={"Connection": "close"}
            )
        wanted = wanted_model(body)
        if isinstance(wanted, Response):
            return wanted
        if wanted not in by_name:
            return _unknown(wanted)
        return Forwarded(request.app.state.client, by_name[wanted], request, body)

    for path in ("/v1/completions", "/v1/chat/completions"):
        app.post(path, tags=["models"], response_model=None, openapi_extra=REQUEST_SCHEMA, operation_id=path)(forward)


def _unknown(model: str) -> Response:
    return openai_error(404, f"The model {model!r} does not exist.", code="model_not_found", param="model")


def _add_state(app: FastAPI, deployments: Sequence[Deployment], traffic: Traffic) -> None:
    @app.get("/health", tags=["state"])
    def health() -> Health:
        """Whether the gateway is alive."""
        return Health()

    @app.get("/ready", tags=["state"], response_model=Readiness, responses={503: {"model": Readiness}})
    def ready(response: Response) -> Readiness:
        """Whether all models answer; 503 until they do."""
        models = {deployment.name: deployment.server.healthy() for deployment in deployments}
        if not all(models.values()):
            response.status_code = 503
            response.headers["Retry-After"] = RETRY_AFTER_SECONDS
        return Readiness(ready=all(models.values()), models=models)

    @app.get("/metrics", tags=["state"], response_class=PlainTextResponse)
    def metrics() -> Response:
        """The gateway's metrics in Prometheus' text format."""
        return Response(traffic.exposition(), media_type=CONTENT_TYPE_LATEST)


def _add_refusals(app: FastAPI) -> None:
    @app.exception_handler(MoestroError)
    async def mistake(_request: Request, error: MoestroError) -> JSONResponse:
        return api_error(error)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return refusal(request.url.path, error.status_code, str(error.detail), error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return refusal(request.url.path, 400, f"{where}: {first['msg']}")
