"""`Record`: the one JSON file beside an artifact's bytes that says what they are and how they came about."""

from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from moestro.config.base import Config
from moestro.errors import ArtifactError

RECORD_NAME = "artifact.json"


class Input(Config):
    """What an artifact was made from."""

    stage: str
    """The stage that made it; `files` for material from outside."""
    fingerprint: str
    """Its identity."""


class FileEntry(Config):
    """One file of an artifact."""

    blake3: str
    """Digest of its bytes (hex)."""
    size: int
    """Bytes."""


class Record(Config):
    """Everything known about an artifact: enough to check it, to explain it and to index it."""

    format: Literal[2] = 2
    """Version of this file's layout."""
    stage: str
    """The stage that made the artifact."""
    version: str
    """The stage's semantic version: raised when its result changes for the same config."""
    fingerprint: str
    """Identity of the artifact."""
    inputs: dict[str, Input]
    """What it was made from, by role, e.g. `seed`, `branch/code`."""
    config: dict[str, Any]
    """The stage's config, complete."""
    result: dict[str, Any]
    """Key figures the stage reported."""
    files: dict[str, FileEntry]
    """Digest and size of every file, by path relative to the artifact."""
    code_version: str
    """Moestro's version, with the git commit where there is one."""
    created_at: datetime
    """When it was published (UTC)."""
    seconds: float
    """Wall time of the attempt that finished."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files.values())

    @classmethod
    def read(cls, folder: Path) -> "Record":
        """The record in `folder`; raises `ArtifactError` if there is none or it cannot be read."""
        path = folder / RECORD_NAME
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise ArtifactError(f"{folder} is not an artifact: it has no {RECORD_NAME}.") from None
        except ValidationError as error:
            raise ArtifactError(
                f"{path} is not a readable record ({error.error_count()} errors).",
                hint="Delete that artifact's folder; it will be made again.",
            ) from None
