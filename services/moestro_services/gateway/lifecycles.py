"""/api/configs and /api/lifecycles: lifecycles are started by the name of a config, followed and stopped."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, cast

from fastapi import APIRouter, Header, Path, Query, Response
from fastapi.responses import StreamingResponse
from starlette.types import Send

from moestro_services.gateway.lifecycles_configs import Configs
from moestro_services.gateway.lifecycles_feed import EVENT_ID_PATTERN, Feeds
from moestro_services.gateway.lifecycles_runs import Lifecycles
from moestro_services.gateway.lifecycles_schemas import (
    CONFIG_PATTERN,
    LIFECYCLE_PATTERN,
    ConfigDetail,
    ConfigSummary,
    LifecycleDetail,
    LifecycleRequest,
    LifecycleSummary,
)
from moestro_services.gateway.management_parts import Admin, ManagementParts, located, refusals
from moestro_services.gateway.openings import changed

ConfigName = Annotated[str, Path(pattern=CONFIG_PATTERN, description="Name of the config.")]
Id = Annotated[str, Path(pattern=LIFECYCLE_PATTERN, description="Id of the lifecycle.")]
STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class EventStream(StreamingResponse):
    """Server-sent events, whose source is closed at once when the follower leaves."""

    media_type = "text/event-stream"

    async def stream_response(self, send: Send) -> None:
        """Send all events."""
        async with aclosing(cast("AsyncGenerator[str]", self.body_iterator)):
            await super().stream_response(send)


def lifecycles(parts: ManagementParts, feeds: Feeds | None = None) -> APIRouter:
    """The routes under /api/configs and /api/lifecycles; `feeds` follows those of the home."""
    router = APIRouter(prefix="/api", responses=refusals(400))
    feeds = feeds or Feeds(Lifecycles(parts.home))
    runs = feeds.lifecycles
    configs = Configs(parts.home.configs)
    _add_configs(router, configs)
    _add_lifecycles(router, runs)
    _add_changes(router, parts, configs, runs)
    _add_events(router, feeds)
    return router


def _add_configs(router: APIRouter, configs: Configs) -> None:
    @router.get("/configs", operation_id="list_configs", tags=["lifecycles"])
    def listed() -> list[ConfigSummary]:
        """The configs that the operator put into the home's folder `configs`."""
        return configs.summaries()

    @router.get("/configs/{name}", operation_id="read_config", tags=["lifecycles"], responses=refusals(404))
    def one(name: ConfigName) -> ConfigDetail:
        """One config, complete."""
        return configs.detail(name)


def _add_lifecycles(router: APIRouter, runs: Lifecycles) -> None:
    @router.get("/lifecycles", operation_id="list_lifecycles", tags=["lifecycles"])
    def listed(
        limit: Annotated[int, Query(ge=1, le=1000, description="The newest so many.")] = 100,
        after: Annotated[
            str | None, Query(pattern=LIFECYCLE_PATTERN, description="The last id of the page before.")
        ] = None,
    ) -> list[LifecycleSummary]:
        """Lifecycles that were started over the API, newest first."""
        return runs.summaries(limit=limit, after=after)

    @router.get("/lifecycles/{id}", operation_id="read_lifecycle", tags=["lifecycles"], responses=refusals(404))
    def one(id: Id) -> LifecycleDetail:  # noqa: A002  (the path's name)
        """One lifecycle with its steps."""
        return runs.detail(id)


def _add_changes(router: APIRouter, parts: ManagementParts, configs: Configs, runs: Lifecycles) -> None:
    @router.post(
        "/lifecycles",
        operation_id="start_lifecycle",
        tags=["lifecycles"],
        status_code=202,
        responses={202: {"headers": located("The lifecycle.")}, **refusals(403, 404, 409, 503)},
    )
    def start(wanted: LifecycleRequest, caller: Admin, response: Response) -> LifecycleDetail:
        """Start a lifecycle as a Prefect flow run, which goes on if the gateway stops; 409 while another one runs."""
        config = changed(configs.load(wanted.config), wanted.changes, name=wanted.config)

        def audited(identity: str) -> None:
            parts.audit.write(
                caller.id, "lifecycle.start", identity, config=wanted.config, changes=dict(wanted.changes)
            )

        started = runs.start(wanted.config, config, wanted.changes, actor=caller.id, audited=audited)
        response.headers["Location"] = f"/api/lifecycles/{started.id}"
        return started

    @router.delete(
        "/lifecycles/{id}",
        operation_id="stop_lifecycle",
        tags=["lifecycles"],
        status_code=202,
        responses={200: {"model": LifecycleDetail, "description": "It had ended."}, **refusals(403, 404)},
    )
    def stop(id: Id, caller: Admin, response: Response) -> LifecycleDetail:  # noqa: A002
        """Stop a lifecycle as Ctrl-C does: what it has done is kept, and started again it resumes."""
        runs.process(id)
        parts.audit.write(caller.id, "lifecycle.stop", id)
        response.status_code = 202 if runs.stop(id) else 200
        return runs.detail(id)


def _add_events(router: APIRouter, feeds: Feeds) -> None:
    @router.get(
        "/lifecycles/{id}/events",
        operation_id="follow_lifecycle",
        tags=["lifecycles"],
        response_class=EventStream,
        responses={204: {"description": "The last event has been seen."}, **refusals(404, 503)},
    )
    async def follow(
        id: Id,  # noqa: A002
        last_event_id: Annotated[
            str | None, Header(pattern=EVENT_ID_PATTERN, description="Id of the last event that was seen.")
        ] = None,
    ) -> Response:
        """What happens, as server-sent events, until the lifecycle has ended."""
        offset = feeds.position(id, last_event_id) if last_event_id else 0
        if offset is None:
            return Response(status_code=204)
        events = feeds.follow(id, offset)
        first = await anext(events)  # what is wrong is said now, with a status of its own
        return EventStream(_with(first, events), headers=STREAM_HEADERS)


async def _with(first: str, rest: AsyncGenerator[str]) -> AsyncGenerator[str]:
    async with aclosing(rest):
        yield first
        async for event in rest:
            yield event
