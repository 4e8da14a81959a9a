"""Timing rivals fairly on a machine that does other things as well.

Every round runs every rival once, in an order that rotates, so that a neighbour's load, a clock change or a warm cache
meets all of them alike. A rival's figure is the median over the rounds; its spread is the distance between the
quartiles. A ratio of two rivals is the median of the ratios *within* a round, which a slow drift does not touch.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds of each round, in the order of the rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median, in seconds."""
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        """The least of all rounds, in seconds: what the machine does when nothing disturbs it."""
        return min(self.seconds)

    @property
    def spread(self) -> float:
        """Distance between the quartiles, as a share of the median."""
        low, high = _quartiles(self.seconds)
        return (high - low) / self.median


@dataclass(frozen=True)
class Ratio:
    """How many times as long one rival takes as another, per round: median and quartiles over the rounds."""

    median: float
    low: float
    high: float


def interleaved(
    rivals: Mapping[str, Callable[[], object]], *, seconds: float, min_rounds: int = 7, max_rounds: int = 200
) -> dict[str, Timing]:
    """Runs all rivals round by round for about `seconds`, after one unmeasured round."""
    names = list(rivals)
    for run in rivals.values():
        run()
    samples: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    for round_number in range(max_rounds):
        shift = round_number % len(names)
        for name in names[shift:] + names[:shift]:
            begin = time.perf_counter()
            rivals[name]()
            samples[name].append(time.perf_counter() - begin)
        if round_number + 1 >= min_rounds and time.perf_counter() > end:
            break
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def ratio(other: Timing, this: Timing) -> Ratio:
    """How many times as long as `this` the `other` takes: above 1 means that `this` is faster."""
    ratios = [slow / fast for slow, fast in zip(other.seconds, this.seconds, strict=True)]
    return Ratio(statistics.median(ratios), *_quartiles(ratios))


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high
