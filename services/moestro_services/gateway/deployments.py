"""`Deployment`: one version of a model, and the server that answers for it."""

from dataclasses import dataclass
from typing import Protocol

from moestro.artifacts import Input


class ModelServer(Protocol):
    """A process that speaks vLLM's OpenAI-compatible API."""

    @property
    def url(self) -> str:
        """Its address, without a trailing slash."""

    def healthy(self) -> bool:
        """Whether it answers requests now."""


@dataclass(frozen=True)
class Deployment:
    """One version of a model: a published deployment with its number in the model registry."""

    name: str
    version: str
    fingerprint: str
    checkpoint: Input
    dtype: str
    max_model_len: int
    created: int
    """Unix time of the deployment's publication."""

    @property
    def label(self) -> str:
        """What every answer of its server bears as its system fingerprint."""
        return f"{self.name}@{self.version}"
