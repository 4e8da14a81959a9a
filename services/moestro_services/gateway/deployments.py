"""`Deployment`: a model name, what it stands for, and the server that answers for it."""

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
    """One served model."""

    name: str
    fingerprint: str
    checkpoint: Input
    dtype: str
    max_model_len: int
    created: int
    """Unix time of the deployment's publication."""
    server: ModelServer
