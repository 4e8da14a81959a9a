"""The registry: what ran, what it made, what was measured, in a database; and metrics and models in MLflow.

Both are indexes over records (`artifact.json`, `runs/<id>.json`), which alone are the truth. `tables` has the schema,
`migrations` its history, `database` opens SQLite or PostgreSQL safely, `index` writes records, `rebuild` writes all
of them, `queries` and `measurements` read, `views` has what they return, `registry` brings it together. `tracking`
is MLflow, `tracked_run` one run in it, `params` what it accepts, `model_registry` the models whose aliases say who gets
traffic, with `model_versions`, `model_writes` and `model_creation`.
"""

from moestro.registry.model_registry import ModelChangedError, ModelRegistry
from moestro.registry.model_versions import ModelVersion, RegisteredModel
from moestro.registry.rebuild import Counts
from moestro.registry.registry import Registry
from moestro.registry.tracked_run import TrackedRun
from moestro.registry.tracking import Tracker
from moestro.registry.views import (
    Deployment,
    Edge,
    Evaluation,
    ExpertStatistics,
    IndexedArtifact,
    Lineage,
    TaskResult,
)

connect = Registry.connect

__all__ = [
    "Counts",
    "Deployment",
    "Edge",
    "Evaluation",
    "ExpertStatistics",
    "IndexedArtifact",
    "Lineage",
    "ModelChangedError",
    "ModelRegistry",
    "ModelVersion",
    "RegisteredModel",
    "Registry",
    "TaskResult",
    "TrackedRun",
    "Tracker",
    "connect",
]
