"""What the API says of lifecycle configs and of the lifecycles that it started."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, JsonValue

from moestro.config import Config
from moestro_services.gateway.openings import FIELD_PATTERN
from moestro_services.gateway.schemas import ErrorBody

CONFIG_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"
LIFECYCLE_PATTERN = r"^[0-9]{8}-[0-9]{6}-[0-9]{6}$"
MAX_CHANGES = 64

State = Literal["starting", "running", "stopping", "completed", "failed", "cancelled", "lost"]
"""`lost`: its process is gone without having said how it ended, as after kill -9."""
StepStatus = Literal["waiting", "running", "completed", "reused", "failed", "cancelled"]


class ConfigSummary(Config):
    """A lifecycle config that may be started by its name."""

    name: str
    """Its name."""
    description: str
    """The comment that the file begins with."""
    domains: tuple[str, ...] = ()
    """Its domains."""
    error: str = ""
    """Why it cannot be started, if it cannot."""


class ConfigDetail(Config):
    """A lifecycle config, complete."""

    name: str
    """Its name."""
    description: str
    """The comment that the file begins with."""
    config: dict[str, Any]
    """All fields, defaults included."""


class LifecycleRequest(Config):
    """What to run."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"config": "quickstart", "changes": {"tune.training.steps": 200}}]}
    )

    config: str = Field(pattern=CONFIG_PATTERN)
    """Name of a config; /api/configs lists them."""
    changes: dict[Annotated[str, Field(pattern=FIELD_PATTERN)], JsonValue] = Field(
        default_factory=dict, max_length=MAX_CHANGES
    )
    """Values of single fields by their dotted paths, for this run alone. Paths and code cannot be changed."""


class StepState(Config):
    """One step of a lifecycle."""

    name: str
    """The step, e.g. `branch code`."""
    status: StepStatus
    """How it stands."""
    done: int = 0
    """Units of the running part that are done."""
    total: int = 0
    """Units of the running part."""
    message: str = ""
    """What it says, or the error it failed with."""
    figures: dict[str, float | None] = Field(default_factory=dict)
    """Figures it logged last; none for one that is no number."""
    seconds: float = 0.0
    """Wall time so far."""
    seconds_left: float | None = None
    """Until the running part is done, at the pace it has."""
    fingerprint: str = ""
    """Identity of its artifact, once it has ended."""


class LifecycleSummary(Config):
    """A lifecycle that was started over the API."""

    id: str
    """Its id: UTC time to the microsecond."""
    config: str
    """Name of the config."""
    changes: dict[str, Any]
    """What was changed in it."""
    actor: str
    """Id of the key that started it."""
    state: State
    """How it stands."""
    started_at: datetime
    """When it was started (UTC)."""
    run: str = ""
    """Id of its run's record under /api/runs, once there is one."""


class LifecycleDetail(LifecycleSummary):
    """A lifecycle with its steps."""

    steps: tuple[StepState, ...]
    """The steps, in the order of the walk."""
    error: ErrorBody | None = None
    """What it failed with."""


class PlannedEvent(Config):
    """The run begins."""

    event: Literal["planned"]
    """Always so."""
    run: str
    """Id of the run."""
    name: str
    """The lifecycle's name."""
    steps: tuple[str, ...]
    """Its steps."""


class StartedEvent(Config):
    """A step begins."""

    event: Literal["started"]
    """Always so."""
    step: str
    """The step."""


class ProgressEvent(Config):
    """A step goes on."""

    event: Literal["progress"]
    """Always so."""
    step: str
    """The step."""
    done: int
    """Units of the part that are done."""
    total: int
    """Units of the part."""
    message: str
    """What it says."""
    figures: dict[str, float | None]
    """Figures it logged last."""
    seconds: float
    """Since it began."""
    seconds_left: float | None
    """Until the part is done, at the pace it has."""


class EndedEvent(Config):
    """A step is done, reused or failed."""

    event: Literal["ended"]
    """Always so."""
    step: str
    """The step."""
    stage: str
    """The stage it is an instance of."""
    fingerprint: str
    """Identity of its artifact."""
    status: Literal["running", "completed", "failed", "cancelled"]
    """How it ended."""
    reused: bool
    """Whether the artifact was there already."""
    message: str
    """The error, if it failed."""
    seconds: float
    """Wall time."""
    result: dict[str, Any] | None
    """Key figures of the stage."""


class FinishedEvent(Config):
    """The last event: the lifecycle has ended."""

    event: Literal["finished"] = "finished"
    """Always so."""
    lifecycle: LifecycleDetail
    """How it ended."""


LifecycleEvent = Annotated[
    PlannedEvent | StartedEvent | ProgressEvent | EndedEvent | FinishedEvent, Field(discriminator="event")
]
