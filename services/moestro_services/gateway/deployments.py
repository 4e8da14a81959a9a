"""`Deployment`: one version of a model; `ModelServer`: the process that answers for it."""

from dataclasses import dataclass
from typing import Protocol

from moestro.artifacts import Input


class ModelServer(Protocol):
    """A process that speaks vLLM's OpenAI-compatible API, such as `VllmServer`; it can be started again."""

    port: int
    """Where it listens on loopback."""
    api_key: str
    """What requests must bear. Both may change with every start."""

    @property
    def url(self) -> str:
        """Its address, without a trailing slash."""

    def start(self, timeout: float = ...) -> None:
        """Start and wait until it answers; raises `ResourceError` or `BusyError` if it does not."""

    def healthy(self) -> bool:
        """Whether it answers requests now."""

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until its process has ended, at most `timeout` seconds; whether it has."""

    def stop(self) -> None:
        """End it, whatever it does; ends `start` and `wait` in other threads as well."""


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
