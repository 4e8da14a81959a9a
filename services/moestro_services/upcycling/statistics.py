"""Means over random seeds with their intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.stats import t as student


@dataclass(frozen=True)
class Interval:
    """A mean over random seeds and the half width of its 95% interval (Student's t), NaN from a single seed; both NaN
    where the figure is none."""

    mean: float
    half_width: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        """Of one value per random seed."""
        if any(math.isnan(value) for value in values):
            return cls(math.nan, math.nan)
        if len(values) < 2:
            return cls(fmean(values), math.nan)
        factor = float(student.ppf(0.975, len(values) - 1))
        return cls(fmean(values), factor * stdev(values) / math.sqrt(len(values)))

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "none"
        return f"{self.mean:.3f}" if math.isnan(self.half_width) else f"{self.mean:.3f} ± {self.half_width:.3f}"


def ratios(values: Sequence[float], to: Sequence[float]) -> Interval:
    """Of values to others of the same random seeds, seed by seed."""
    return Interval.of([value / other for value, other in zip(values, to, strict=True)])
