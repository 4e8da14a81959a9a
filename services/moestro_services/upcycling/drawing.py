"""Figures by layer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

LABELS = ("own expert's share, by uniform routing", "distance between domains")


def draw_layers(curves: Mapping[str, tuple[Sequence[Sequence[float]], Sequence[Sequence[float]]]], path: Path) -> None:
    """Draw, by model, both figures of every layer: means over random seeds, least and most shaded. An SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, label, part in zip(figure.subplots(1, 2), LABELS, (0, 1), strict=True):
        for name, found in curves.items():
            layers = list(zip(*found[part], strict=True))
            numbers = range(len(layers))
            axes.plot(numbers, [fmean(values) for values in layers], marker="o", label=name)
            axes.fill_between(
                numbers, [min(values) for values in layers], [max(values) for values in layers], alpha=0.2
            )
        axes.set(xlabel="layer", ylabel=label, ylim=(0, None))
    figure.axes[1].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
