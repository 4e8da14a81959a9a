"""Reward curves of many arms."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from math import ceil
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

from moestro_services.upcycling.statistics import Interval

COLUMNS = 2


def draw_rewards(curves: Mapping[str, Sequence[Sequence[float]]], path: Path) -> None:
    """Draw, by arm, the mean reward over random seeds and its 95% interval at every update. An SVG."""
    rows = ceil(len(curves) / COLUMNS)
    figure = Figure(figsize=(10, 2.4 * rows), layout="constrained")
    grid = figure.subplots(rows, COLUMNS, squeeze=False, sharex=True, sharey=True).flatten()
    for axes, (name, runs) in zip(grid, curves.items(), strict=False):
        updates = [[value for value in values if value is not None] for values in zip_longest(*runs)]
        means = [fmean(values) for values in updates]
        widths = [Interval.of(values).half_width if len(values) > 1 else 0.0 for values in updates]
        numbers = range(1, len(means) + 1)
        axes.fill_between(
            numbers,
            [mean - width for mean, width in zip(means, widths, strict=True)],
            [mean + width for mean, width in zip(means, widths, strict=True)],
            alpha=0.25,
        )
        axes.plot(numbers, means, marker="o", markersize=3)
        axes.set_title(name, loc="left", fontsize="medium")
        axes.set(xlabel="policy update", ylabel="reward")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
