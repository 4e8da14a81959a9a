"""A new version in MLflow's model registry. The weights stay in the artifact store."""

import re
import tempfile
from pathlib import Path

from moestro.artifacts import Artifact
from moestro.errors import InputError, ResourceError
from moestro.registry.tracked_run import client
from moestro.registry.tracking import UNPREPARED, is_server, shown

STAGE_TAG = "moestro.stage"
FINGERPRINT_TAG = "moestro.fingerprint"
NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}")
"""Names of models, as `deploy.name` allows them."""


def require_name(name: str) -> None:
    """Raise `InputError` unless `name` may be a model's."""
    if not NAME.fullmatch(name):
        raise InputError(
            f"{name!r} cannot be the name of a model.",
            hint="Letters, digits, dots, dashes and underscores, 63 at most, the first a letter or digit.",
        )


def create_version(uri: str, experiment: str, name: str, artifact: Artifact, run_id: str) -> str:
    """Make a version of model `name` that stands for `artifact` and return its number.

    MLflow gets an external model that names the artifact: a version that names a local path directly would be refused
    by MLflow's HTTP server. A process that dies on the way leaves at most a model without a version, which is none.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.models.utils import get_external_mlflow_model_spec

    mlflow = client(uri)
    try:
        mlflow.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    found = mlflow.get_experiment_by_name(experiment)
    if found is None:
        raise ResourceError(f"MLflow at {shown(uri)} has no experiment {experiment!r}.", hint=UNPREPARED)
    tags = {STAGE_TAG: artifact.stage, FINGERPRINT_TAG: artifact.fingerprint}
    model = mlflow.create_logged_model(
        found.experiment_id,
        name=name,
        source_run_id=run_id or None,
        tags={**tags, "mlflow.model.isExternal": "true"},
        model_type=artifact.stage,
    )
    with tempfile.TemporaryDirectory() as folder:
        get_external_mlflow_model_spec(model).save(str(Path(folder) / "MLmodel"))
        mlflow.log_model_artifacts(model.model_id, folder)
    mlflow.finalize_logged_model(model.model_id, "READY")
    # A server refuses local paths. The embedded store looks up a `models:/` source, and the run of a model that comes
    # without one, in whatever MLflow's global URI names.
    server = is_server(uri)
    source = model.model_uri if server else model.artifact_location
    model_id = model.model_id if server or run_id else None
    created = mlflow.create_model_version(name, source, run_id or None, tags=tags, model_id=model_id)
    return str(created.version)
