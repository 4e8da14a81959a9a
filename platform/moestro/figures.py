"""Figures from data: pure functions that return a matplotlib `Figure`, in one style, without pyplot's global state.

Colours are Okabe and Ito's, told apart by people with any colour vision; heatmaps go from white to dark blue. `save`
writes the same bytes for the same figure.

Legend: L layers, E experts, D domains, N points.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5F5F5F", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HEAT = "Blues"
STYLE: dict[str, Any] = {
    "figure.facecolor": "white",
    "figure.dpi": 144,
    "axes.facecolor": "white",
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.labelsize": 9.5,
    "axes.labelcolor": "#333333",
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "font.family": "DejaVu Sans",
    "svg.fonttype": "path",
    "svg.hashsalt": "moestro",
}
MAX_ANNOTATED = 10


def loss_curves(histories: Mapping[str, Sequence[Mapping[str, Any]]], *, title: str = "Training loss") -> Figure:
    """Loss (nats per token) over steps, one line per name; `histories` are the `steps` of `history.json` files.

    Few points are marked; many are drawn thin with their running mean on top.
    """
    with rc_context(STYLE):
        figure, axes = _single(title, x="optimiser step", y="loss (nats per token)")
        for (name, steps), colour in zip(histories.items(), cycle(COLOURS), strict=False):
            x_N = np.array([entry["step"] for entry in steps], dtype=float)
            y_N = np.array([entry["loss"] for entry in steps], dtype=float)
            _noisy_line(axes, x_N, y_N, name, colour)
        _legend(axes, len(histories))
        return figure


def reward_curve(history: Sequence[Mapping[str, Any]], *, title: str = "Reward of the rollouts") -> Figure:
    """Mean reward per policy update; `history` are the `steps` of the rl stage's `history.json`.

    The band is one standard deviation among the completions of one prompt (`reward_std`). Rewards that all lie in
    [0, 1] are drawn on that scale, and the band is cut to it.
    """
    x_N, mean_N, std_N = (np.array([entry[key] for entry in history]) for key in ("step", "reward", "reward_std"))
    with rc_context(STYLE):
        figure, axes = _single(title, x="policy update", y="reward")
        bounded = bool((mean_N >= 0).all() and (mean_N <= 1).all())
        low_N, high_N = ((np.clip(edge_N, 0, 1) if bounded else edge_N) for edge_N in (mean_N - std_N, mean_N + std_N))
        axes.fill_between(x_N, low_N, high_N, color=COLOURS[0], alpha=0.18, linewidth=0, label="± std within a prompt")
        axes.plot(x_N, mean_N, color=COLOURS[0], marker="o", markersize=4, label="mean of all rollouts")
        if bounded:
            axes.set_ylim(-0.02, 1.02)
        _legend(axes, 2)
        return figure


PANELS = {
    "entropy": "entropy (nats)",
    "r3/k3_kl": "engine against trainer, k3 (nats)",
    "r3/router_mismatch": "own router differs (share)",
    "clip_ratio/region_mean": "clipped tokens (share)",
    "completions/mean_length": "length of completions (tokens)",
    "grad_norm": "gradient norm",
    "kl": "divergence from the beginning (nats)",
    "rewards/margins": "margin of implicit rewards",
    "rewards/accuracies": "chosen answers preferred (share)",
}
"""Figures of an rl stage that are drawn beside its reward or loss, by name in its history."""


def policy_panels(history: Sequence[Mapping[str, Any]], *, title: str = "Policy updates") -> Figure:
    """Those of `PANELS` that the `steps` of an rl stage's `history.json` have, one small plot each."""
    known = {name: label for name, label in PANELS.items() if name in history[0]}
    rows = ceil(len(known) / 2)
    with rc_context(STYLE):
        figure = Figure(figsize=(8.4, 2.2 * rows), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        grid = figure.subplots(rows, 2, squeeze=False).flatten()
        x_N = np.array([entry["step"] for entry in history], dtype=float)
        for axes, (name, label) in zip(grid, known.items(), strict=False):
            y_N = np.array([entry[name] for entry in history], dtype=float)
            _noisy_line(axes, x_N, y_N, label, COLOURS[0])
            axes.set(xlabel="policy update", ylabel=label)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in grid[len(known) :]:
            axes.set_visible(False)
        return figure


def held_out_loss(
    losses: Mapping[str, Mapping[str, float | None]], *, title: str = "Held-out loss after each stage"
) -> Figure:
    """Held-out loss (nats per token) by stage, one line per domain; `losses` is stage -> domain -> loss.

    A domain a stage was not measured on leaves a gap.
    """
    stages = list(losses)
    domains = list(dict.fromkeys(domain for values in losses.values() for domain in values))
    with rc_context(STYLE):
        figure, axes = _single(
            title, x="", y="held-out loss (nats per token)", width=max(6.4, 1.6 + 0.95 * len(stages))
        )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for domain, colour, marker in zip(domains, cycle(COLOURS), cycle(MARKERS), strict=False):
            y_N = np.array([_number(losses[stage].get(domain)) for stage in stages])
            axes.plot(range(len(stages)), y_N, color=colour, marker=marker, markersize=6, label=domain)
        axes.set_xticks(range(len(stages)), [stage.replace(" ", "\n") for stage in stages])
        axes.set_xlim(-0.4, len(stages) - 0.6)
        axes.grid(axis="x", visible=False)
        _legend(axes, len(domains))
        return figure


def expert_heatmap(
    counts: Any,
    *,
    domains: Sequence[str],
    origins: Sequence[Sequence[str]],
    title: str = "Which experts take which domain",
) -> Figure:
    """One heatmap per layer: the share of a domain's expert slots that each expert took (columns sum to 100 %).

    `counts` [L, E, D] tokens; `origins` [L][E] names where each expert comes from.
    """
    counts_LED = np.asarray(counts, dtype=float)
    total_LD = counts_LED.sum(axis=1, keepdims=True)
    share_LED = np.divide(counts_LED, total_LD, out=np.zeros_like(counts_LED), where=total_LD > 0)
    bar = "share of the domain's expert slots"
    return _heatmaps(
        share_LED, rows=_expert_names(origins), columns=[list(domains)] * len(share_LED), title=title, bar=bar
    )


def coactivation(
    counts: Any, *, origins: Sequence[Sequence[str]], title: str = "Which experts work together"
) -> Figure:
    """One heatmap per layer: of the tokens that chose the row's expert, the share that also chose the column's.

    `counts` [L, E, E]: tokens that chose both, on the diagonal tokens that chose the expert (OLMoE, arXiv 2409.02060,
    over all pairs). The diagonal is left blank.
    """
    counts_LEE = np.asarray(counts, dtype=float)
    chosen_LE1 = np.diagonal(counts_LEE, axis1=1, axis2=2)[..., None]
    share_LEE = np.divide(counts_LEE, chosen_LE1, out=np.zeros_like(counts_LEE), where=chosen_LE1 > 0)
    experts = np.arange(counts_LEE.shape[1])
    share_LEE[:, experts, experts] = np.nan
    names = _expert_names(origins)
    columns = [[str(expert) for expert in experts]] * len(names)
    return _heatmaps(
        share_LEE, rows=names, columns=columns, title=title, bar="share of the row's tokens", x="also chose expert"
    )


def save(figure: Figure, path: Path) -> None:
    """Write `figure` as PNG or SVG, by the suffix of `path`; the same figure gives the same bytes."""
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    with rc_context(STYLE):
        figure.savefig(path, metadata=metadata)


def _single(title: str, *, x: str, y: str, width: float = 6.4) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, 3.8), layout="constrained")
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def _noisy_line(axes: Axes, x_N: np.ndarray, y_N: np.ndarray, name: str, colour: str) -> None:
    if len(x_N) <= 60:
        axes.plot(x_N, y_N, color=colour, label=name, marker="o" if len(x_N) <= 20 else "", markersize=3)
        return
    axes.plot(x_N, y_N, color=colour, alpha=0.25, linewidth=0.8)
    width = max(3, len(x_N) // 40)
    weight_N = np.convolve(np.ones_like(y_N), np.ones(width), mode="same")
    axes.plot(x_N, np.convolve(y_N, np.ones(width), mode="same") / weight_N, color=colour, label=name)


def _legend(axes: Axes, entries: int) -> None:
    """To the right of the axes, where it hides nothing; none for a single unnamed thing."""
    if entries:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)


def _expert_names(origins: Sequence[Sequence[str]]) -> list[list[str]]:
    return [[f"{expert} {origin}".strip() for expert, origin in enumerate(layer)] for layer in origins]


def _heatmaps(
    values_LRC: np.ndarray, *, rows: list[list[str]], columns: list[list[str]], title: str, bar: str, x: str = ""
) -> Figure:
    """A grid of heatmaps, one per layer, with one colour scale from 0 to the largest value."""
    layers, height, width = values_LRC.shape
    across = min(4, layers)
    down = ceil(layers / across)
    longest = max((len(name) for layer in rows for name in layer), default=0)
    size = (
        max(across * (0.5 * min(width, 16) + 0.35) + 0.09 * longest + 1.6, 0.095 * len(title) + 0.1),
        max(down * (0.36 * min(height, 24) + 0.8) + 0.7, 0.07 * len(bar) + 0.9),
    )  # inches; no smaller than title and bar's label need
    top = max(float(np.nanmax(values_LRC, initial=0.0)), 1e-9)
    with rc_context({**STYLE, "axes.grid": False, "axes.titlesize": 9.5, "axes.titleweight": "normal"}):
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(down, across, squeeze=False, sharex=False)
        for layer, axes in enumerate(grid.flat):
            if layer >= layers:
                axes.set_axis_off()
                continue
            axes.set_facecolor("#E9E9E9")
            image = axes.imshow(values_LRC[layer], cmap=HEAT, vmin=0.0, vmax=top, aspect="auto")
            axes.set_title(f"layer {layer}")
            axes.set_xticks(range(width), columns[layer], rotation=35 if max(map(len, columns[layer])) > 4 else 0)
            axes.set_yticks(range(height), rows[layer] if rows[layer] != rows[0] or layer % across == 0 else [])
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            axes.set_xlabel(x if layer // across == down - 1 else "")
            if width <= MAX_ANNOTATED and height <= MAX_ANNOTATED:
                _annotate(axes, values_LRC[layer], top)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        colour_bar = figure.colorbar(
            image, ax=grid, format=PercentFormatter(1.0, decimals=0), shrink=min(1.0, 5 / size[1]), aspect=18, pad=0.02
        )
        colour_bar.set_label(bar)
        colour_bar.outline.set_visible(False)
        return figure


def _annotate(axes: Axes, values_RC: np.ndarray, top: float) -> None:
    for (row, column), value in np.ndenumerate(values_RC):
        if np.isfinite(value):
            colour = "white" if value > 0.6 * top else "#222222"
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=8)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
