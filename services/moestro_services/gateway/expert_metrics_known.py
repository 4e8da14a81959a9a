"""What is known of a served version beforehand: how it routes, and how it routed the domains it was profiled on.

D domains, L layers with experts, E experts.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from moestro.errors import ArtifactError
from moestro.inference.routes import RoutingShape, returned_routing
from moestro_flows.home import Home
from moestro_services.catalog import Catalog
from moestro_services.gateway.deployments import Deployment


@dataclass(frozen=True)
class DomainProfile:
    """A profile's counts."""

    fingerprint: str
    """The profile artifact."""
    domains: tuple[str, ...]
    """Its domains."""
    counts_DLE: np.ndarray
    """Tokens of each domain that chose each expert, int64."""


class Known(Protocol):
    """Where the two are looked up; both may raise a `MoestroError`, and are called off the event loop."""

    def shape(self, deployment: Deployment) -> RoutingShape | None:
        """How the routes look that vLLM returns for it; None if it returns none."""

    def profile(self, deployment: Deployment) -> DomainProfile | None:
        """Its newest profile; None if it was never profiled."""


class KnownAtHome:
    """`Known` from the records and files of a home."""

    def __init__(self, home: Home) -> None:
        self._home = home

    def shape(self, deployment: Deployment) -> RoutingShape | None:
        """Raises `InputError` without a readable config in the checkpoint, which is not verified a second time here."""
        checkpoint = deployment.checkpoint
        folder = self._home.store.folder(checkpoint.stage, checkpoint.fingerprint)
        return returned_routing(folder, deployment.max_model_len)

    def profile(self, deployment: Deployment) -> DomainProfile | None:
        """Raises `ArtifactError` if the profile's file is missing or is none."""
        entry = Catalog(self._home).measurement("profile", deployment.checkpoint.fingerprint)
        return read_profile(entry.path, entry.record.fingerprint) if entry else None


def read_profile(folder: Path, fingerprint: str) -> DomainProfile | None:
    """The counts of the profile in `folder`, of domains that have any; None if none has.

    Raises `ArtifactError` without a readable file.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / "routing.safetensors"
    try:
        with safe_open(path, framework="numpy") as file:
            names = sorted(name for name in file.keys() if name.startswith("counts/"))  # noqa: SIM118
            counts = {name.removeprefix("counts/"): file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} is not a readable profile ({error}).") from None
    told = {domain: counts_LE for domain, counts_LE in counts.items() if (counts_LE.sum(axis=1) > 0).all()}
    return DomainProfile(fingerprint, tuple(told), np.stack(list(told.values()))) if told else None
