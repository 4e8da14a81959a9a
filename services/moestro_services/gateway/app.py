"""The gateway's FastAPI application: models under /v1, what the home holds under /api, and its own state."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from moestro.errors import MoestroError
from moestro_flows.home import Home
from moestro_services.gateway.errors import RETRY_AFTER_SECONDS, Refused, api_error, refusal
from moestro_services.gateway.fleet import Fleet
from moestro_services.gateway.inventory import inventory
from moestro_services.gateway.proxy import MAX_BODY_BYTES, Answered, Preparing, Proxy
from moestro_services.gateway.readiness import Readiness, card, cards, readiness
from moestro_services.gateway.schemas import Health, ModelCard, ModelList
from moestro_services.gateway.traffic import Observed, RollbackCollector, Traffic
from moestro_services.gateway.upstream import Upstream
from moestro_services.gateway.watch import Watch

Wrap = Callable[[ASGIApp, Traffic], ASGIApp]
"""Puts a middleware around an application."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the application is made of."""

    home: Home
    fleet: Fleet
    watch: Watch | None = None
    """Hears of every answer."""
    answered: Sequence[Answered] = ()
    preparing: Sequence[Preparing] = ()
    collectors: Sequence[Collector] = ()
    """What else /metrics tells."""
    routers: Sequence[APIRouter] = ()
    """What else there is beside models, inventory and state."""
    wraps: Sequence[Wrap] = field(default=())
    """Middleware, the outermost first: who is let in comes after who writes the log."""
    max_body_bytes: int = MAX_BODY_BYTES
    """Most that a request to a model may have, whoever sends it."""


def create_app(parts: Parts) -> FastAPI:
    """The application. Its middleware, from the outside: counting, then `parts.wraps`."""
    traffic = Traffic(parts.fleet, _collectors(parts))
    upstream = Upstream(parts.fleet.endpoints)

    @asynccontextmanager
    async def with_upstream(_app: FastAPI) -> AsyncIterator[None]:
        async with upstream:
            yield

    app = FastAPI(title="Moestro", lifespan=with_upstream, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.traffic = traffic
    proxy = Proxy(
        parts.fleet,
        upstream,
        traffic,
        watch=parts.watch,
        answered=parts.answered,
        preparing=parts.preparing,
        max_body_bytes=parts.max_body_bytes,
    )
    _add_models(app, parts.fleet, proxy)
    _add_state(app, parts.fleet, traffic)
    for router in (inventory(parts.home, parts.fleet), *parts.routers):
        app.include_router(router)
    _add_refusals(app)
    for wrap in reversed(parts.wraps):
        app.add_middleware(_Wrapped, wrap=wrap, traffic=traffic)
    app.add_middleware(Observed, traffic=traffic)
    return app


class _Wrapped:
    """A `Wrap` in the form in which FastAPI takes middleware."""

    def __new__(cls, app: ASGIApp, wrap: Wrap, traffic: Traffic) -> Any:
        """What the wrap makes of `app`."""
        return wrap(app, traffic)


def _collectors(parts: Parts) -> list[Collector]:
    watched = [RollbackCollector(parts.watch.rollbacks)] if parts.watch else []
    return [*watched, *parts.collectors]


def _add_models(app: FastAPI, fleet: Fleet, proxy: Proxy) -> None:
    def forwarded() -> None:
        """Answered by the model's vLLM server; request and response are vLLM's own, streams included."""

    for path in ("/v1/completions", "/v1/chat/completions"):
        route = APIRoute(
            path,
            forwarded,
            methods=["POST"],
            tags=["models"],
            response_model=None,
            operation_id=path,
        )
        route.app = proxy  # FastAPI describes the route and stays out of its way
        app.router.routes.append(route)

    @app.get("/v1/models", tags=["models"])
    def models() -> ModelList:
        """The served models: each by its name, by its aliases and by its versions' numbers."""
        return ModelList(data=cards(fleet))

    @app.get("/v1/models/{model}", tags=["models"])
    def model(model: str) -> ModelCard:
        """One served model."""
        return card(fleet, model)


def _add_state(app: FastAPI, fleet: Fleet, traffic: Traffic) -> None:
    @app.get("/health", tags=["state"])
    def health() -> Health:
        """Whether the gateway is alive."""
        return Health()

    @app.get("/ready", tags=["state"], response_model=Readiness, responses={503: {"model": Readiness}})
    def ready(response: Response) -> Readiness:
        """Whether every model's champion answers, and how the servers stand; 503 until they do."""
        found = readiness(fleet)
        if not found.ready:
            response.status_code = 503
            response.headers["Retry-After"] = RETRY_AFTER_SECONDS
        return found

    @app.get("/metrics", tags=["state"], response_class=PlainTextResponse)
    def metrics() -> Response:
        """The gateway's metrics in Prometheus' text format."""
        return Response(traffic.exposition(), media_type=CONTENT_TYPE_LATEST)


def _add_refusals(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def no_answer(_request: Request, error: Refused) -> JSONResponse:
        return error.response()

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
