"""What was seen of one version of a model: totals since it was first sampled, and a window that slides with time.

Its size depends on the model alone, never on how much was seen. Not safe for threads: `ExpertMetrics` locks it.

L layers with experts, E experts, B steps of the window.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moestro.inference.routes import RoutingShape
from moestro.profiling import loads
from moestro.profiling.drift import Drift, drift
from moestro_services.gateway.deployments import Deployment
from moestro_services.gateway.expert_metrics_answers import Counted
from moestro_services.gateway.expert_metrics_known import DomainProfile
from moestro_services.gateway.expert_metrics_sampling import Sampling


class Window:
    """Counts [L, E] of the last `seconds`, forgotten in `steps` steps."""

    def __init__(self, layers: int, experts: int, *, seconds: float, steps: int) -> None:
        self._counts_BLE = np.zeros((steps, layers, experts), np.int64)
        self._tokens_B = np.zeros(steps, np.int64)
        self._step_seconds = seconds / steps
        self._step = 0

    def add(self, counted: Counted, now: float) -> None:
        """Count at the time `now`, in seconds on any clock that does not go back."""
        self._move(now)
        at = self._step % len(self._tokens_B)
        self._counts_BLE[at] += counted.counts_LE
        self._tokens_B[at] += counted.tokens

    def read(self, now: float) -> Counted:
        """What was counted in the window that ends at `now`."""
        self._move(now)
        return Counted(self._counts_BLE.sum(axis=0), int(self._tokens_B.sum()))

    def _move(self, now: float) -> None:
        steps = len(self._tokens_B)
        step = int(now // self._step_seconds)
        for passed in range(max(self._step + 1, step - steps + 1), step + 1):
            self._counts_BLE[passed % steps] = 0
            self._tokens_B[passed % steps] = 0
        self._step = max(self._step, step)


@dataclass(frozen=True)
class Seen:
    """A copy of what was seen of a version."""

    deployment: Deployment
    """The version."""
    window: Counted
    """The window's counts."""
    total_LE: np.ndarray
    """Tokens that chose each expert since the version was first sampled."""
    total_tokens: int
    """Tokens seen since then."""
    requests: Mapping[str, int]
    """Requests counted since then, by source."""
    profile: DomainProfile | None
    """What it is compared with."""


class VersionTraffic:
    """What was seen of one version."""

    def __init__(self, deployment: Deployment, shape: RoutingShape, sampling: Sampling) -> None:
        layers = shape.num_layers - len(shape.dense_layers)
        self.deployment = deployment
        self.shape = shape
        self.profile: DomainProfile | None = None
        self.profile_due = -np.inf
        """When to look for the profile, if there is none yet."""
        self._window = Window(layers, shape.num_experts, seconds=sampling.window_seconds, steps=sampling.window_steps)
        self._total_LE = np.zeros((layers, shape.num_experts), np.int64)
        self._total_tokens = 0
        self._requests: Counter[str] = Counter()

    def add(self, counted: Counted, source: str, now: float) -> None:
        """Count one request."""
        self._window.add(counted, now)
        self._total_LE += counted.counts_LE
        self._total_tokens += counted.tokens
        self._requests[source] += 1

    def compare_with(self, profile: DomainProfile | None) -> None:
        """Take `profile` as what drift is measured from, if it is one of this model."""
        if profile is not None and profile.counts_DLE.shape[1:] == self._total_LE.shape:
            self.profile = profile

    def seen(self, now: float) -> Seen:
        """A copy."""
        return Seen(
            deployment=self.deployment,
            window=self._window.read(now),
            total_LE=self._total_LE.copy(),
            total_tokens=self._total_tokens,
            requests=dict(self._requests),
            profile=self.profile,
        )


@dataclass(frozen=True)
class Figures:
    """Figures of a window, per layer."""

    load_variation_L: np.ndarray
    """Standard deviation of the experts' loads over their mean."""
    max_violation_L: np.ndarray
    """Largest load over the mean load, minus 1."""
    entropy_L: np.ndarray
    """Entropy of the experts' shares, 1 for uniform ones."""
    dead_LE: np.ndarray
    """Which experts are dead."""
    drift: Drift | None
    """Distance from the profile; None without one."""


def figures(seen: Seen, sampling: Sampling) -> Figures | None:
    """The figures of the window; None if it holds fewer than `min_tokens`."""
    if seen.window.tokens < sampling.min_tokens:
        return None
    counts_LE = seen.window.counts_LE
    return Figures(
        load_variation_L=loads.load_variation(counts_LE),
        max_violation_L=loads.max_violation(counts_LE),
        entropy_L=loads.entropy_ratio(counts_LE),
        dead_LE=loads.dead(counts_LE, share=sampling.dead_share),
        drift=drift(counts_LE, seen.profile.counts_DLE) if seen.profile else None,
    )
