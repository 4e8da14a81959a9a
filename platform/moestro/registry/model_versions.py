"""What the model registry says of a model: its versions, and which alias points to which."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

CHAMPION = "champion"
CHALLENGER = "challenger"
PREVIOUS = "previous"


@dataclass(frozen=True)
class ModelVersion:
    """One version of a registered model: a deployment artifact."""

    name: str
    version: str
    stage: str
    fingerprint: str
    created_at: datetime
    tags: Mapping[str, str]


@dataclass(frozen=True)
class RegisteredModel:
    """A registered model; `aliases` maps an alias to a version."""

    name: str
    versions: tuple[ModelVersion, ...]
    """Newest first."""
    aliases: Mapping[str, str]
    canary_share: float
    """Share of the requests for the bare name that @challenger answers, 0 to 1."""

    def aliased(self, alias: str) -> ModelVersion | None:
        """The version `alias` points to."""
        wanted = self.aliases.get(alias)
        return next((version for version in self.versions if version.version == wanted), None)
