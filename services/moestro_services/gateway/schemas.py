"""Response models of the gateway's own API. Records and runs are given as they stand in their files."""

from datetime import datetime
from typing import Literal

from moestro.artifacts import Input, Record, Status
from moestro.config import Config
from moestro_services.catalog import Ancestor

ServingState = Literal["serving", "starting", "draining", "lost", "not served"]
"""`lost`: its process ended and is being started again."""


class ErrorBody(Config):
    """What went wrong and what to do."""

    kind: str
    """The kind of error."""
    message: str
    """What went wrong."""
    hint: str = ""
    """What to do about it."""


class ErrorResponse(Config):
    """Body of every refusal under /api."""

    error: ErrorBody
    """The error."""


class Health(Config):
    """The gateway is alive."""

    status: Literal["ok"] = "ok"
    """Always so."""


class ModelCard(Config):
    """A served model, as OpenAI's API describes one."""

    id: str
    """Name to ask for."""
    object: Literal["model"] = "model"
    """Always so."""
    created: int
    """Unix time of the deployment."""
    owned_by: str = "moestro"
    """Always so."""
    root: str
    """The checkpoint: stage and fingerprint."""
    max_model_len: int
    """Longest sequence, prompt and completion together."""


class ModelList(Config):
    """The served models."""

    object: Literal["list"] = "list"
    """Always so."""
    data: tuple[ModelCard, ...]
    """The models."""


class RunSummary(Config):
    """One lifecycle run."""

    id: str
    """Its id."""
    name: str
    """The lifecycle's name."""
    status: Status
    """How it stands."""
    started_at: datetime
    """When it began."""
    seconds: float
    """Wall time."""
    steps: int
    """Steps that ended."""
    reused: int
    """Of these, the ones whose artifact was there already."""


class ArtifactSummary(Config):
    """One published artifact."""

    stage: str
    """The stage that made it."""
    fingerprint: str
    """Its identity."""
    created_at: datetime
    """When it was published."""
    seconds: float
    """Wall time of the attempt that finished."""
    size: int
    """Bytes of all files."""


class ArtifactDetail(Config):
    """One artifact: its record, what it was made from and what was made from it."""

    record: Record
    """The record beside its bytes."""
    lineage: tuple[Ancestor, ...]
    """It and all its ancestors, each before what it was made from."""
    used_by: tuple[ArtifactSummary, ...]
    """The artifacts it is an input of."""


class DeploymentState(Config):
    """One deployment and whether this gateway serves it."""

    name: str
    """The model's name."""
    version: str = ""
    """Its version in the model registry, if a process of this gateway answers for it."""
    fingerprint: str
    """The deployment's artifact."""
    checkpoint: Input
    """What is served."""
    dtype: str
    """Type vLLM computes in."""
    max_model_len: int
    """Longest sequence."""
    created_at: datetime
    """When it passed its gate."""
    state: ServingState
    """How it stands with this gateway."""
