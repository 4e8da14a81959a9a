"""/api: runs, artifacts, experts and deployments, as the records of the home tell them. Read only.

Lists come newest first; the next page is asked for with `after`, the last item of the one before, and stays the same
when something new is published meanwhile.
"""

from collections.abc import Sequence
from typing import Annotated, cast

from fastapi import APIRouter, Path, Query

from moestro.artifacts import LifecycleRun, StepRun
from moestro_flows.home import Home
from moestro_services.catalog import Catalog, Entry
from moestro_services.expertise import Expertise, read_expertise
from moestro_services.gateway.management_parts import Fleet, ReplicaState, refusals
from moestro_services.gateway.schemas import (
    ArtifactDetail,
    ArtifactSummary,
    DeploymentState,
    RunSummary,
    ServingState,
)
from moestro_services.served import describe

Limit = Annotated[int, Query(ge=1, le=10_000, description="The newest so many.")]
RunReference = Annotated[
    str,
    Path(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$",
        description="A run's id, the beginning of one, a lifecycle's name (its newest run), or `latest`.",
    ),
]
ArtifactReference = Annotated[
    str,
    Path(
        pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$",
        description="A fingerprint, the beginning of one (4 digits or more), or a stage's name (its newest artifact).",
    ),
]
Stage = Annotated[str, Query(pattern=r"^([a-z][a-z_-]{0,31})?$", description="Only those of this stage.")]
AfterRun = Annotated[str | None, Query(pattern=r"^[A-Za-z0-9-]{1,64}$", description="The last id of the page before.")]
AfterArtifact = Annotated[
    str | None, Query(pattern=r"^[0-9a-f]{64}$", description="The last fingerprint of the page before.")
]


def inventory(home: Home, fleet: Fleet) -> APIRouter:
    """The routes under /api over `home`, where `fleet` knows what is served."""
    router = APIRouter(prefix="/api", responses=refusals(400))
    _add_runs(router, home)
    _add_artifacts(router, home)
    _add_deployments(router, home, fleet)
    return router


def _add_runs(router: APIRouter, home: Home) -> None:
    @router.get("/runs", operation_id="list_runs", tags=["runs"])
    def runs(limit: Limit = 100, after: AfterRun = None) -> list[RunSummary]:
        """Lifecycle runs, newest first."""
        found = [run for run in Catalog(home).runs if after is None or run.id < after]
        return [_run(run) for run in found[:limit]]

    @router.get("/runs/{run_id}", operation_id="read_run", tags=["runs"], responses=refusals(404))
    def run(run_id: RunReference) -> LifecycleRun:
        """One run with its config and its steps."""
        return Catalog(home).run(run_id)

    @router.get("/runs/{run_id}/steps", operation_id="list_steps", tags=["runs"], responses=refusals(404))
    def steps(run_id: RunReference) -> tuple[StepRun, ...]:
        """The stage runs of one run, in the order in which they ended."""
        return Catalog(home).run(run_id).steps


def _add_artifacts(router: APIRouter, home: Home) -> None:
    @router.get("/artifacts", operation_id="list_artifacts", tags=["artifacts"], responses=refusals(404))
    def artifacts(stage: Stage = "", limit: Limit = 1000, after: AfterArtifact = None) -> list[ArtifactSummary]:
        """Published artifacts, newest first."""
        catalog = Catalog(home)
        begin = 0 if after is None else catalog.entries.index(catalog.published(after)) + 1
        entries = [entry for entry in catalog.entries[begin:] if not stage or entry.record.stage == stage]
        return [_artifact(entry) for entry in entries[:limit]]

    @router.get("/artifacts/{fingerprint}", operation_id="read_artifact", tags=["artifacts"], responses=refusals(404))
    def artifact(fingerprint: ArtifactReference) -> ArtifactDetail:
        """One artifact: its record, all it was made from, and what was made from it."""
        catalog = Catalog(home)
        record = catalog.published(fingerprint).record
        return ArtifactDetail(
            record=record,
            lineage=tuple(catalog.lineage(record)),
            used_by=tuple(_artifact(entry) for entry in catalog.made_from(record.fingerprint)),
        )

    @router.get("/experts/{fingerprint}", operation_id="read_experts", tags=["artifacts"], responses=refusals(404))
    def experts(fingerprint: ArtifactReference) -> Expertise:
        """What each expert of a checkpoint specialised in."""
        catalog = Catalog(home)
        return read_expertise(catalog.profile_of(catalog.published(fingerprint)).path)


def _add_deployments(router: APIRouter, home: Home, fleet: Fleet) -> None:
    @router.get("/deployments", operation_id="list_deployments", tags=["deployments"])
    def deployments() -> list[DeploymentState]:
        """Checkpoints that passed the deployment gate, newest first, and whether they are served here."""
        replicas = fleet.replicas()
        entries = [entry for entry in Catalog(home).entries if entry.record.stage == "deploy"]
        return [_deployment(entry, replicas) for entry in entries]


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


def _deployment(entry: Entry, replicas: Sequence[ReplicaState]) -> DeploymentState:
    served = describe(entry.artifact)
    own = [replica for replica in replicas if replica.fingerprint == entry.record.fingerprint]
    replica = next((replica for replica in own if replica.state == "serving"), own[0] if own else None)
    return DeploymentState(
        name=served.name,
        version=replica.version if replica else "",
        fingerprint=entry.record.fingerprint,
        checkpoint=served.checkpoint,
        dtype=served.dtype,
        max_model_len=served.max_model_len,
        created_at=entry.record.created_at,
        state=cast("ServingState", str(replica.state)) if replica else "not served",
    )
