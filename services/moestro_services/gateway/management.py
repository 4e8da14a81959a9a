"""/api/models and /api/audit: versions of models, who gets traffic, and who changed it."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Annotated, cast

from fastapi import APIRouter, Path, Query, Response

from moestro.errors import InputError
from moestro.registry.model_versions import ModelVersion, RegisteredModel
from moestro_services.catalog import Catalog
from moestro_services.gateway.management_parts import (
    Admin,
    ManagementParts,
    Promotion,
    ReplicaState,
    located,
    refusals,
)
from moestro_services.gateway.management_schemas import (
    MODEL_PATTERN,
    NUMBER_PATTERN,
    AuditRecord,
    Model,
    PromoteRequest,
    PromotionResult,
    RegisterRequest,
    Replica,
    RollbackRequest,
    Version,
)
from moestro_services.gateway.schemas import ServingState
from moestro_services.served import describe

Name = Annotated[str, Path(pattern=MODEL_PATTERN, description="Name of the model.")]
Number = Annotated[str, Path(pattern=NUMBER_PATTERN, description="Number of the version.")]
Running = Mapping[tuple[str, str], Sequence[ReplicaState]]


def management(parts: ManagementParts) -> APIRouter:
    """The routes under /api/models and /api/audit. What changes something is for administrators alone."""
    router = APIRouter(prefix="/api", responses=refusals(400))
    _add_reading(router, parts)
    _add_versions(router, parts)
    _add_traffic(router, parts)
    return router


def _add_reading(router: APIRouter, parts: ManagementParts) -> None:
    @router.get("/models", operation_id="list_models", tags=["models"])
    def models() -> list[Model]:
        """Registered models with their versions, aliases and the processes that answer for them."""
        running = _running(parts)
        return [_model(model, running) for model in parts.models.models()]

    @router.get("/models/{name}", operation_id="read_model", tags=["models"], responses=refusals(404))
    def model(name: Name) -> Model:
        """One model."""
        return _model(parts.models.model(name), _running(parts))

    @router.get("/audit", operation_id="read_audit", tags=["audit"], responses=refusals(403))
    def audit(
        _caller: Admin, limit: Annotated[int, Query(ge=1, le=10_000, description="The newest so many.")] = 100
    ) -> list[AuditRecord]:
        """Management calls, newest first. For administrators."""
        return [
            AuditRecord(
                at=entry.at, actor=entry.actor, action=entry.action, target=entry.target, details=dict(entry.details)
            )
            for entry in parts.audit.read(limit)
        ]


def _add_versions(router: APIRouter, parts: ManagementParts) -> None:
    @router.post(
        "/models/{name}/versions",
        operation_id="register_version",
        tags=["models"],
        status_code=201,
        responses={201: {"headers": located("The model.")}, **refusals(403, 404, 409)},
    )
    def register(name: Name, wanted: RegisterRequest, caller: Admin, response: Response) -> PromotionResult:
        """Make a version of a deployment. The first one becomes the champion, later ones the challenger."""
        artifact = Catalog(parts.home).published(wanted.deployment).artifact
        served = describe(artifact)
        if served.name != name:
            raise InputError(
                f"Deployment {wanted.deployment} is of the model {served.name!r}.",
                hint=f"POST it to /api/models/{served.name}/versions.",
            )
        response.headers["Location"] = f"/api/models/{name}"
        return _result(parts.promotions.register(artifact, actor=caller.id))

    @router.delete(
        "/models/{name}/versions/{version}",
        operation_id="delete_version",
        tags=["models"],
        status_code=204,
        responses=refusals(403, 404, 409),
    )
    def delete(name: Name, version: Number, caller: Admin) -> None:
        """Remove a version from the registry; 409 while an alias points to it. Its artifact stays."""
        parts.promotions.delete(name, version, actor=caller.id)


def _add_traffic(router: APIRouter, parts: ManagementParts) -> None:
    changing = refusals(403, 404, 409)

    @router.post("/models/{name}/promote", operation_id="promote_version", tags=["models"], responses=changing)
    def promote(name: Name, wanted: PromoteRequest, caller: Admin) -> PromotionResult:
        """Give a version all traffic, or a share of it as a canary. Refused by a gate unless forced."""
        done = parts.promotions.promote(name, wanted.version, share=wanted.share, force=wanted.force, actor=caller.id)
        return _result(done)

    @router.post("/models/{name}/rollback", operation_id="roll_back", tags=["models"], responses=changing)
    def rollback(name: Name, caller: Admin, wanted: RollbackRequest | None = None) -> PromotionResult:
        """End a canary, or else give the traffic back to the version before the champion; 409 if there is none."""
        reason = wanted.reason if wanted else ""
        return _result(parts.promotions.rollback(name, reason=reason, actor=caller.id))


def _running(parts: ManagementParts) -> Running:
    found: dict[tuple[str, str], list[ReplicaState]] = defaultdict(list)
    for replica in parts.fleet.replicas():
        found[replica.name, replica.version].append(replica)
    return found


def _model(model: RegisteredModel, running: Running) -> Model:
    return Model(
        name=model.name,
        aliases=dict(model.aliases),
        canary_share=model.canary_share,
        versions=tuple(_version(version, model, running) for version in model.versions),
    )


def _version(version: ModelVersion, model: RegisteredModel, running: Running) -> Version:
    return Version(
        version=version.version,
        fingerprint=version.fingerprint,
        created_at=version.created_at,
        aliases=tuple(sorted(alias for alias, number in model.aliases.items() if number == version.version)),
        tags=dict(version.tags),
        replicas=tuple(
            Replica(
                state=cast("ServingState", str(replica.state)),
                in_flight=replica.in_flight,
                restarts=replica.restarts,
                reason=replica.reason if replica.state == "lost" else "",
            )
            for replica in running.get((model.name, version.version), ())
        ),
    )


def _result(done: Promotion) -> PromotionResult:
    return PromotionResult(
        name=done.name,
        version=done.version,
        aliases=dict(done.aliases),
        canary_share=done.canary_share,
        forced=done.forced,
        refused=tuple(done.refused),
        changed=done.changed,
    )
