"""What queries return: frozen values, detached from the database. Runs are returned as `LifecycleRun` itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from moestro.artifacts import Input


@dataclass(frozen=True)
class IndexedArtifact:
    """A published artifact. `inputs` by role, `size` in bytes, `seconds` of wall time."""

    stage: str
    fingerprint: str
    version: str
    inputs: Mapping[str, Input]
    config: Mapping[str, Any]
    result: Mapping[str, Any]
    code_version: str
    created_at: datetime
    seconds: float
    size: int


@dataclass(frozen=True)
class Edge:
    """`source` went into `target` in the role `role`."""

    source: Input
    role: str
    target: Input


@dataclass(frozen=True)
class Lineage:
    """All edges above an artifact (towards what it was made from) and below it (towards what was made from it)."""

    artifact: Input
    ancestors: tuple[Edge, ...]
    descendants: tuple[Edge, ...]


@dataclass(frozen=True)
class TaskResult:
    """Share of a task's problems that were answered exactly."""

    task: str
    problems: int
    accuracy: float


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of one checkpoint. `step` is what the checkpoint is called in its run, e.g. `branch code`.

    `held_out_loss` in nats per token and `tokens` by domain; a loss that was not finite is None.
    """

    step: str
    checkpoint: Input
    evaluation: str
    held_out_loss: Mapping[str, float | None]
    tokens: Mapping[str, int]
    task: TaskResult | None


@dataclass(frozen=True)
class ExpertStatistics:
    """Who routes where in one checkpoint: counts, so that profiles can be summed.

    `counts` and `gate_mass` are [layer][expert][domain], `tokens` is [layer][domain], `origins` [layer][expert];
    domains stand in the order of `domains`.
    """

    checkpoint: str
    profile: str
    domains: tuple[str, ...]
    origins: tuple[tuple[str, ...], ...]
    counts: tuple[tuple[tuple[int, ...], ...], ...]
    gate_mass: tuple[tuple[tuple[float, ...], ...], ...]
    tokens: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Deployment:
    """A checkpoint that was let through the gates, or forced past them, and their figures."""

    name: str
    artifact: str
    checkpoint: Input
    dtype: str
    max_model_len: int
    gates: Mapping[str, Any]
    created_at: datetime
