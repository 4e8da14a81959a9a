"""/api: runs, artifacts, experts and deployments, as the records of the home tell them. Read only."""

from typing import Annotated, Any

from fastapi import APIRouter, Query

from moestro.artifacts import LifecycleRun
from moestro_flows.home import Home
from moestro_services.catalog import Catalog, Entry
from moestro_services.expertise import Expertise, read_expertise
from moestro_services.gateway.fleet import Fleet
from moestro_services.gateway.schemas import (
    ArtifactDetail,
    ArtifactSummary,
    DeploymentState,
    ErrorResponse,
    RunSummary,
)
from moestro_services.served import describe

Limit = Annotated[int, Query(ge=1, le=10_000, description="The newest so many.")]


def inventory(home: Home, fleet: Fleet) -> APIRouter:
    """The routes under /api over `home`, where `fleet` is what this gateway serves."""
    refusals: dict[int | str, dict[str, Any]] = {status: {"model": ErrorResponse} for status in (400, 404)}
    router = APIRouter(prefix="/api", tags=["inventory"], responses=refusals)

    @router.get("/runs")
    def runs(limit: Limit = 100) -> list[RunSummary]:
        """Lifecycle runs, newest first."""
        return [_run(run) for run in Catalog(home).runs[:limit]]

    @router.get("/runs/{run_id}")
    def run(run_id: str) -> LifecycleRun:
        """One run with its steps; `latest`, a lifecycle's name or the beginning of an id will do."""
        return Catalog(home).run(run_id)

    @router.get("/artifacts")
    def artifacts(stage: str = "", limit: Limit = 1000) -> list[ArtifactSummary]:
        """Published artifacts, newest first."""
        entries = [entry for entry in Catalog(home).entries if not stage or entry.record.stage == stage]
        return [_artifact(entry) for entry in entries[:limit]]

    @router.get("/artifacts/{fingerprint}")
    def artifact(fingerprint: str) -> ArtifactDetail:
        """One artifact with its lineage; the beginning of a fingerprint or a stage's name (the newest) will do."""
        catalog = Catalog(home)
        record = catalog.published(fingerprint).record
        return ArtifactDetail(
            record=record,
            lineage=tuple(catalog.lineage(record)),
            used_by=tuple(_artifact(entry) for entry in catalog.made_from(record.fingerprint)),
        )

    @router.get("/experts/{fingerprint}")
    def experts(fingerprint: str) -> Expertise:
        """What each expert of a checkpoint specialised in."""
        catalog = Catalog(home)
        return read_expertise(catalog.profile_of(catalog.published(fingerprint)).path)

    @router.get("/deployments")
    def all_deployments() -> list[DeploymentState]:
        """Checkpoints that passed the deployment gate, newest first."""
        states = {replica.fingerprint: replica.state.value for replica in fleet.replicas()}
        entries = [entry for entry in Catalog(home).entries if entry.record.stage == "deploy"]
        return [_deployment(entry, states.get(entry.record.fingerprint, "not served")) for entry in entries]

    return router


def _run(run: LifecycleRun) -> RunSummary:
    return RunSummary(
        id=run.id,
        name=run.name,
        status=run.status,
        started_at=run.started_at,
        seconds=run.seconds,
        steps=len(run.steps),
        reused=sum(step.reused for step in run.steps),
    )


def _artifact(entry: Entry) -> ArtifactSummary:
    record = entry.record
    return ArtifactSummary(
        stage=record.stage,
        fingerprint=record.fingerprint,
        created_at=record.created_at,
        seconds=record.seconds,
        size=record.size,
    )


def _deployment(entry: Entry, state: str) -> DeploymentState:
    served = describe(entry.artifact)
    return DeploymentState(
        name=served.name,
        fingerprint=entry.record.fingerprint,
        checkpoint=served.checkpoint,
        dtype=served.dtype,
        max_model_len=served.max_model_len,
        created_at=entry.record.created_at,
        state=state,
    )
