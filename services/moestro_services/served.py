"""`Served`: what a deployment artifact says is to be served."""

from typing import Any

from pydantic import ConfigDict, Field, ValidationError

from moestro.artifacts import Artifact, Input
from moestro.config import Config
from moestro.errors import ArtifactError

DEPLOYMENT_NAME = "deployment.json"


class Served(Config):
    """The contents of `deployment.json`."""

    model_config = ConfigDict(extra="ignore")

    name: str
    """Name of the model."""
    checkpoint: Input
    """What is served."""
    dtype: str
    """Type vLLM computes in."""
    max_model_len: int
    """Longest sequence served."""
    tool_call_parser: str = ""
    """vLLM's parser of tool calls; empty parses none."""
    gates: dict[str, Any] = Field(default_factory=dict)
    """Figures, thresholds and verdict of every gate, by its name."""
    forced: str = ""
    """The reason for which it may be served although gates refused it; empty if they decided."""


def describe(artifact: Artifact) -> Served:
    """What `artifact`, a deployment, says; raises `ArtifactError` if it is none."""
    path = artifact.path / DEPLOYMENT_NAME
    try:
        return Served.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ArtifactError(
            f"{artifact.stage} {artifact.fingerprint[:16]} is not a deployment: it has no {DEPLOYMENT_NAME}.",
            hint="Deployments are made by the deploy stage: `moestro show artifacts --stage deploy`.",
        ) from None
    except ValidationError as error:
        raise ArtifactError(f"{path} is not a readable deployment ({error.error_count()} errors).") from None
