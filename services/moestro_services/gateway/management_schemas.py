"""What the API says of models and their versions, and what is told to it to change them."""

from datetime import datetime
from typing import Any

from pydantic import ConfigDict, Field

from moestro.config import Config
from moestro_services.gateway.schemas import ServingState

MODEL_PATTERN = r"^[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}$"
VERSION_PATTERN = r"^([0-9]{1,9}|champion|challenger|previous)$"
NUMBER_PATTERN = r"^[0-9]{1,9}$"
FINGERPRINT_PATTERN = r"^[0-9a-f]{4,64}$"
LONGEST_REASON = 500


class Replica(Config):
    """A process that answers for a version."""

    state: ServingState
    """How it stands."""
    in_flight: int
    """Requests it is answering."""
    restarts: int
    """How often it was started again."""
    reason: str
    """Why it is lost; empty while it is not."""


class Version(Config):
    """One version of a model: a deployment that passed its gate."""

    version: str
    """Its number."""
    fingerprint: str
    """The deployment's artifact."""
    created_at: datetime
    """When it was registered."""
    aliases: tuple[str, ...]
    """Aliases that point to it."""
    tags: dict[str, str]
    """What the registry notes of it."""
    replicas: tuple[Replica, ...]
    """Processes that answer for it here."""


class Model(Config):
    """A registered model."""

    name: str
    """Name to ask for."""
    aliases: dict[str, str]
    """Version of each alias: @champion, @challenger, @previous."""
    canary_share: float
    """Share of the requests for the bare name that @challenger answers, 0 to 1."""
    versions: tuple[Version, ...]
    """Its versions, newest first."""


class RegisterRequest(Config):
    """The deployment to make a version of."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"deployment": "3f9a6c0d1b2e4857"}]})

    deployment: str = Field(pattern=FINGERPRINT_PATTERN)
    """Fingerprint of a `deploy` artifact, or the beginning of it."""


class PromoteRequest(Config):
    """Who gets traffic."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"version": "challenger", "share": 0.1}]})

    version: str = Field("challenger", pattern=VERSION_PATTERN)
    """Number or alias."""
    share: float | None = Field(None, gt=0, lt=1)
    """Share of the requests as a canary; all of them if none is given."""
    force: str = Field("", max_length=LONGEST_REASON)
    """The reason for promoting although gates refuse; it is recorded."""


class RollbackRequest(Config):
    """Why."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"reason": "answers are too slow"}]})

    reason: str = Field("", max_length=LONGEST_REASON)
    """The reason; it is recorded."""


class PromotionResult(Config):
    """How a model stands after a change."""

    name: str
    """The model."""
    version: str
    """The version that the change was about."""
    aliases: dict[str, str]
    """Version of each alias."""
    canary_share: float
    """Share of the requests that @challenger answers."""
    forced: str
    """Why it was done although gates refused; empty if none did."""
    refused: tuple[str, ...]
    """What the gates refused, with figure and threshold."""
    changed: bool
    """False if everything was already so."""


class AuditRecord(Config):
    """One management call."""

    at: datetime
    """When (UTC)."""
    actor: str
    """Id of the key."""
    action: str
    """What was done."""
    target: str
    """To what."""
    details: dict[str, Any]
    """What else was said of it."""
