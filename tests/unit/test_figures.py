"""Figures show the data they are given, say what their axes are, and are saved byte for byte the same."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import rcParams
from matplotlib.figure import Figure

from moestro import figures

HISTORY = [{"step": step, "loss": 4.0 / step, "learning_rate": 0.1} for step in range(1, 5)]
REWARDS = [{"step": step, "reward": 0.1 * step, "reward_std": 0.3} for step in range(1, 9)]
POLICY = [{"step": step, "entropy": 1.0 / step, "r3/k3_kl": 1e-4, "loss": 0.1} for step in range(1, 9)]
ORIGINS = [["code", "docs", "seed"]] * 2
COUNTS_LED = [[[6, 1], [2, 3], [0, 0]], [[0, 4], [0, 4], [0, 0]]]
COACTIVATION_LEE = [[[8, 6, 2], [6, 12, 0], [2, 0, 0]]]


def every_figure() -> dict[str, Figure]:
    """One of each."""
    return {
        "loss": figures.loss_curves({"branch code": HISTORY, "branch docs": HISTORY[:2]}),
        "reward": figures.reward_curve(REWARDS),
        "policy": figures.policy_panels(POLICY),
        "held_out": figures.held_out_loss({"seed": {"code": 3.0, "docs": 4.0}, "mix": {"code": 2.0, "docs": None}}),
        "experts": figures.expert_heatmap(COUNTS_LED, domains=["code", "docs"], origins=ORIGINS),
        "coactivation": figures.coactivation(COACTIVATION_LEE, origins=ORIGINS[:1]),
    }


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_saved_bytes_are_the_same_every_time(tmp_path: Path, suffix: str) -> None:
    for attempt in ("first", "second"):
        (tmp_path / attempt).mkdir()
        for name, figure in every_figure().items():
            figures.save(figure, tmp_path / attempt / f"{name}.{suffix}")
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert len(names) == 6
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


def test_lines_are_the_history() -> None:
    axes = every_figure()["loss"].axes[0]
    code, docs = axes.get_lines()
    np.testing.assert_array_equal(code.get_xydata(), [[1, 4.0], [2, 2.0], [3, 4 / 3], [4, 1.0]])
    assert len(docs.get_xydata()) == 2
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["branch code", "branch docs"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimiser step", "loss (nats per token)")


def test_long_histories_get_a_running_mean_that_ends_unbiased() -> None:
    history = [{"step": step, "loss": 2.0} for step in range(200)]
    raw, mean = figures.loss_curves({"seed": history}).axes[0].get_lines()
    np.testing.assert_array_equal(raw.get_ydata(), np.full(200, 2.0))
    np.testing.assert_allclose(mean.get_ydata(), np.full(200, 2.0))


def test_reward_band_is_cut_to_what_a_reward_can_be() -> None:
    axes = every_figure()["reward"].axes[0]
    band_N2 = axes.collections[0].get_paths()[0].vertices
    assert (band_N2[:, 1].min(), round(band_N2[:, 1].max(), 6)) == (0.0, 1.0)
    np.testing.assert_allclose(axes.get_lines()[0].get_ydata(), [0.1 * step for step in range(1, 9)])


def test_missing_held_out_loss_leaves_a_gap() -> None:
    axes = every_figure()["held_out"].axes[0]
    code, docs = axes.get_lines()
    np.testing.assert_array_equal(code.get_ydata(), [3.0, 2.0])
    np.testing.assert_array_equal(docs.get_ydata(), [4.0, np.nan])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["seed", "mix"]


def test_expert_heatmap_shows_each_domains_share_per_layer() -> None:
    first, second, bar = every_figure()["experts"].axes
    np.testing.assert_allclose(first.get_images()[0].get_array(), [[0.75, 0.25], [0.25, 0.75], [0, 0]])
    np.testing.assert_allclose(second.get_images()[0].get_array(), [[0, 0.5], [0, 0.5], [0, 0]])
    assert [label.get_text() for label in first.get_yticklabels()] == ["0 code", "1 docs", "2 seed"]
    assert [label.get_text() for label in first.get_xticklabels()] == ["code", "docs"]
    assert bar.get_ylabel() == "share of the domain's expert slots"


def test_coactivation_is_the_share_of_the_rows_tokens() -> None:
    axes = every_figure()["coactivation"].axes[0]
    shown = np.ma.filled(axes.get_images()[0].get_array(), np.nan)
    np.testing.assert_allclose(shown, [[np.nan, 0.75, 0.25], [0.5, np.nan, 0.0], [0.0, 0.0, np.nan]])


def test_many_layers_and_experts_still_fit(tmp_path: Path) -> None:
    origins = [[f"domain{expert}" for expert in range(32)]] * 6
    figure = figures.expert_heatmap(np.ones((6, 32, 3)), domains=["a", "b", "c"], origins=origins)
    assert sum(axes.axison for axes in figure.axes) == 7
    figures.save(figure, tmp_path / "large.png")


@pytest.mark.parametrize("experts", [1, 2, 3, 8])
@pytest.mark.parametrize("layers", [1, 2, 5])
def test_title_and_colour_bar_label_lie_within_the_smallest_figures(layers: int, experts: int) -> None:
    origins = [["x"] * experts] * layers
    title = "compress: which experts take which domain"
    made = (
        figures.expert_heatmap(np.ones((layers, experts, 1)), domains=["x"], origins=origins, title=title),
        figures.coactivation(np.ones((layers, experts, experts)), origins=origins, title=title),
    )
    for figure in made:
        figure.draw_without_rendering()
        for text in (figure.axes[-1].yaxis.label, *figure.texts):
            box = text.get_window_extent()
            assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, text
            assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, text


def test_style_does_not_leak_and_pyplot_stays_out() -> None:
    before = dict(rcParams)
    every_figure()
    assert dict(rcParams) == before
    check = "import sys, moestro.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
