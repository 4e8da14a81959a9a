"""How fast the server answers: medians over streamed requests, of this machine as busy as it is."""

from collections.abc import Sequence
from itertools import cycle, islice
from statistics import median
from typing import ClassVar

from transformers import PreTrainedModel

from moestro.config import LatencyGate
from moestro.deployment.gates.gate import Subject, Verdict, above, finite
from moestro.inference.client import Endpoint
from moestro.inference.timing import Timing, time_over_http


class Latency:
    """The gate: time to the first token, and of each token after it."""

    timed: ClassVar[bool] = True

    def __init__(self, subject: Subject) -> None:
        """Choose the prompts, the domains in turn."""
        self._gate = subject.config.latency
        wanted = self._gate.requests * self._gate.prompt_tokens
        windows = [
            subject.spread_windows(domain, length=self._gate.prompt_tokens, max_tokens=wanted).tolist()
            for domain in subject.tokens
        ]
        turns = [cycle(domain) for domain in windows]
        self._prompts: list[list[int]] = [next(turn) for turn in islice(cycle(turns), self._gate.requests)]
        self._timings: list[Timing] = []

    def ask(self, endpoint: Endpoint, port: int) -> None:  # noqa: ARG002
        """Time the answers."""
        self._timings = time_over_http(
            endpoint, self._prompts, output_tokens=self._gate.output_tokens, concurrency=self._gate.concurrency
        )

    def judge(self, network: PreTrainedModel) -> Verdict:  # noqa: ARG002
        """Hold the medians against the gate."""
        first, later = medians(self._timings)
        return Verdict(
            refused=tuple(refusals(first, later, self._gate)),
            thresholds=self._gate,
            times={"first_token_seconds": finite(first), "per_token_seconds": finite(later)},
        )


def medians(timings: Sequence[Timing]) -> tuple[float, float]:
    """Median seconds to the first token, and of each token after it."""
    first = median(timing.first_token_seconds for timing in timings)
    return first, median(timing.per_token_seconds for timing in timings)


def refusals(first: float, later: float, gate: LatencyGate) -> list[str]:
    """What is beyond the gate, with figures and thresholds."""
    return [
        *above("the median time to the first token", first, gate.max_first_token_seconds, " s"),
        *above("the median time of each later token", later, gate.max_per_token_seconds, " s"),
    ]
