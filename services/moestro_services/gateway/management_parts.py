"""What the management API asks of the gateway's other parts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Protocol

from fastapi import Depends, HTTPException, Request

from moestro.artifacts import Artifact
from moestro.registry.model_versions import RegisteredModel
from moestro_flows.home import Home
from moestro_services.gateway.caller import Caller, Scope, caller_of
from moestro_services.gateway.schemas import ErrorResponse


class ReplicaState(Protocol):
    """A process that answers for one version of a model."""

    @property
    def name(self) -> str:
        """The model."""

    @property
    def version(self) -> str:
        """Its version."""

    @property
    def fingerprint(self) -> str:
        """The deployment's artifact."""

    @property
    def state(self) -> str:
        """`starting`, `serving`, `draining` or `lost`."""

    @property
    def in_flight(self) -> int:
        """Requests it is answering."""

    @property
    def restarts(self) -> int:
        """How often it was started again."""

    @property
    def reason(self) -> str:
        """Why it is lost."""


class Fleet(Protocol):
    """What serves."""

    def replicas(self) -> Sequence[ReplicaState]:
        """All processes, as they stand."""


class Models(Protocol):
    """The model registry, to be read."""

    def models(self) -> Sequence[RegisteredModel]:
        """All models."""

    def model(self, name: str) -> RegisteredModel:
        """One; raises `InputError` if there is none of that name."""


class Promotion(Protocol):
    """How a model stands after a change."""

    @property
    def name(self) -> str:
        """The model."""

    @property
    def version(self) -> str:
        """The version that the change was about."""

    @property
    def aliases(self) -> Mapping[str, str]:
        """Version of each alias."""

    @property
    def canary_share(self) -> float:
        """Share of the requests that @challenger answers."""

    @property
    def forced(self) -> str:
        """Why it was done although gates refused."""

    @property
    def refused(self) -> Sequence[str]:
        """What the gates refused."""

    @property
    def changed(self) -> bool:
        """False if everything was already so."""


class Promotions(Protocol):
    """Changes of who gets traffic. Each writes to the audit log."""

    def register(self, artifact: Artifact, *, actor: str) -> Promotion:
        """Make a version of a deployment."""

    def promote(
        self, name: str, version: str = "challenger", *, share: float | None = None, force: str = "", actor: str
    ) -> Promotion:
        """Give it all traffic, or a share."""

    def rollback(self, name: str, *, reason: str = "", actor: str) -> Promotion:
        """Take the last promotion back."""

    def delete(self, name: str, version: str, *, actor: str) -> object:
        """Remove a version that no alias points to."""


class AuditEntry(Protocol):
    """One line of the audit log."""

    @property
    def at(self) -> datetime:
        """When."""

    @property
    def actor(self) -> str:
        """Id of the key."""

    @property
    def action(self) -> str:
        """What was done."""

    @property
    def target(self) -> str:
        """To what."""

    @property
    def details(self) -> Mapping[str, Any]:
        """What else was said of it."""


class Audit(Protocol):
    """The log of management calls."""

    def write(self, actor: str, action: str, target: str, **details: Any) -> None:
        """Add an entry; `details` are JSON values."""

    def read(self, limit: int) -> Sequence[AuditEntry]:
        """The newest, newest first."""


@dataclass(frozen=True, kw_only=True)
class ManagementParts:
    """What `management` and `lifecycles` are made of."""

    home: Home
    fleet: Fleet
    models: Models
    promotions: Promotions
    audit: Audit


def _admin(request: Request) -> Caller:
    caller = caller_of(request.scope)
    if not caller.may(Scope.ADMIN):
        raise HTTPException(403, "This needs a key with the scope admin.")
    return caller


Admin = Annotated[Caller, Depends(_admin)]
"""The caller of a route that only administrators may use. The door asks as well."""


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The refusals that a route gives of itself, for its description; `openapi` adds what the door gives."""
    return {status: {"model": ErrorResponse} for status in statuses}


def located(path: str) -> dict[str, Any]:
    """Description of a Location header."""
    return {"Location": {"description": path, "schema": {"type": "string"}}}
