"""`LifecycleRun`: one run of a lifecycle as one JSON file; database and MLflow are indexes over it."""

import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from moestro.artifacts.store import disk_space_errors
from moestro.config.base import Config
from moestro.errors import ArtifactError

Status = Literal["running", "completed", "failed", "cancelled"]


class StepRun(Config):
    """One step of a lifecycle run."""

    name: str
    """The step, e.g. `branch code` or `evaluate mix`."""
    stage: str
    """The stage it is an instance of."""
    fingerprint: str
    """Identity of its artifact."""
    status: Status
    """How it stands."""
    reused: bool = False
    """Whether the artifact was there already."""
    started_at: datetime
    """When it began (UTC)."""
    seconds: float = 0.0
    """Wall time of this step in this run."""
    message: str = ""
    """The error, if it failed."""
    mlflow_run_id: str = ""
    """Its MLflow run."""


class LifecycleRun(Config):
    """One run of a lifecycle."""

    format: Literal[1] = 1
    """Version of this file's layout."""
    id: str
    """Sortable id: UTC time and a random suffix."""
    name: str
    """The lifecycle's name."""
    status: Status
    """How it stands."""
    config: dict[str, Any]
    """The complete lifecycle config."""
    started_at: datetime
    """When it began (UTC)."""
    seconds: float = 0.0
    """Wall time."""
    steps: tuple[StepRun, ...] = ()
    """Its steps, in the order in which they ended."""
    mlflow_run_id: str = ""
    """Its MLflow run."""

    def write(self, folder: Path) -> None:
        """Write `<id>.json` into `folder` in one atomic step."""
        temporary = folder / f".{self.id}.{os.getpid()}.tmp"
        with disk_space_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
            temporary.replace(folder / f"{self.id}.json")


def read_runs(folder: Path) -> Iterator[LifecycleRun]:
    """Every run recorded in `folder`, oldest first; raises `ArtifactError` naming a file that is not readable."""
    for path in sorted(folder.glob("*.json")):
        try:
            yield LifecycleRun.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise ArtifactError(
                f"{path} is not a readable run record ({error.error_count()} errors).",
                hint="Delete it: the artifacts of that run are not affected.",
            ) from None
