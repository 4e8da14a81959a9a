"""`Candidate`: a version of a model with the deployment it stands for, found in the store and whole."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moestro.artifacts import Artifact, ArtifactStore
from moestro.errors import ArtifactError, InputError
from moestro.registry import ModelVersion, RegisteredModel
from moestro.registry.model_versions import CHALLENGER
from moestro_services.served import DEPLOYMENT_NAME, describe

DIGITS = 16


@dataclass(frozen=True)
class Candidate:
    """A version whose deployment is there as it was published, and so is its checkpoint."""

    version: ModelVersion
    deployment: Mapping[str, Any]
    """`deployment.json`, parsed."""
    result: Mapping[str, Any]
    """Key figures of its record."""

    @classmethod
    def of(cls, store: ArtifactStore, version: ModelVersion, *, served: bool = False) -> "Candidate":
        """The candidate that `version` is; raises `ArtifactError` if anything of it is missing or damaged.

        The checkpoint of one that is `served` already is not looked at.
        """
        what = f"{version.name}@{version.version}"
        artifact = _deployment(store, version.stage, version.fingerprint, what)
        if not served:
            _check_checkpoint(store, artifact, what)
        content = json.loads((artifact.path / DEPLOYMENT_NAME).read_bytes())
        return cls(version, content, artifact.record.result)


def check_whole(store: ArtifactStore, stage: str, fingerprint: str, *, what: str) -> None:
    """Raise `ArtifactError`, calling it `what`, unless the deployment with this fingerprint and its checkpoint are in
    `store`, byte by byte as they were published."""
    _check_checkpoint(store, _deployment(store, stage, fingerprint, what), what)


def _deployment(store: ArtifactStore, stage: str, fingerprint: str, what: str) -> Artifact:
    artifact = store.find(stage, fingerprint)
    if artifact is None:
        raise _missing(what, "deployment", f"{stage} {fingerprint[:DIGITS]}")
    return artifact


def _check_checkpoint(store: ArtifactStore, artifact: Artifact, what: str) -> None:
    checkpoint = describe(artifact).checkpoint
    if store.find(checkpoint.stage, checkpoint.fingerprint) is None:
        raise _missing(what, "checkpoint", f"{checkpoint.stage} {checkpoint.fingerprint[:DIGITS]}")


def _missing(what: str, part: str, name: str) -> ArtifactError:
    return ArtifactError(
        f"The {part} of {what} ({name}) is not in this home's store.",
        hint="Running its lifecycle, or `moestro deploy`, again makes what is missing; or it is another home's model.",
    )


def meant(model: RegisteredModel, reference: str) -> ModelVersion:
    """The version of `model` that `reference`, a number or an alias, means; raises `InputError` naming those."""
    number = model.aliases.get(reference, reference)
    for version in model.versions:
        if version.version == number:
            return version
    names = [f"@{alias} ({number})" for alias, number in sorted(model.aliases.items())]
    numbers = [version.version for version in model.versions]
    hint = f"There are the versions {', '.join(numbers)}" + (f", and {', '.join(names)}." if names else ".")
    if reference == CHALLENGER:
        hint += " The next deployment becomes the challenger: `moestro deploy`, or a lifecycle with another config."
    raise InputError(f"{model.name} has no version or alias {reference!r}.", hint=hint)
