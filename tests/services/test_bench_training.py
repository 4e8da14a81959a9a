"""`moestro bench training` at toy size: its rows and bounds are whole, and both sides compute the same loss."""

import pytest
import torch

from moestro.config import ModelConfig
from moestro_kernels.experts_mlp.bench import Shape
from moestro_kernels.timing import Timing
from moestro_services import bench_training
from moestro_services.bench_training import Line, bench
from moestro_services.bench_training_step import Workload
from moestro_services.cli.bench import BENCHMARKS

TOY = ModelConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
)


def test_the_command_knows_it() -> None:
    assert BENCHMARKS["training"] == f"{bench_training.__name__}:bench"


def test_toy_sizes_give_whole_rows_and_bounds() -> None:
    workloads = tuple(Workload("toy", TOY, 2, 16, num_experts) for num_experts in (0, 3))
    report = bench(workloads=workloads, shapes=(Shape(3, 2, 32, 32, 16),), seconds=0.0, rounds=2)
    assert len(report["rows"]) == 2 * 2 + 2
    assert {len(row) for row in report["rows"]} == {len(report["columns"])}
    bounds = {bound["what"]: bound for bound in report["bounds"]}
    assert len(bounds) == len(report["bounds"]) == 2 * (2 * 2) + 2 + 1
    assert all(set(bound) == {"what", "value", "limit", "ok"} for bound in report["bounds"])
    same = [bound for what, bound in bounds.items() if "difference of the first losses" in what]
    assert len(same) == 4
    assert all(bound["ok"] for bound in same)


def test_the_ratio_is_that_of_the_best_rival_within_rounds() -> None:
    timings = {
        "moestro": Timing((1.0, 2.0, 4.0)),
        "grouped_mm": Timing((3.0, 6.0, 12.0)),
        "eager": Timing((1.5, 3.0, 6.0)),
        "batched_mm": Timing((9.0,)),
    }
    line = Line("block", "float32", timings, ("grouped_mm", "eager"), 4e9, 4e9)
    assert line.best == "eager"
    assert line.ratio == 1.5
    assert dict(zip(bench_training.COLUMNS, line.cells, strict=True))["of peak"] == "50%"
    assert line.cells[5] == "(9000)"
    timings["batched_mm"] = Timing((1.0,))
    assert line.ratio == 0.5


@pytest.mark.parametrize(("ratios", "ahead"), [((1.3, 1.2), 2), ((1.3, 1.1), 1), ((0.9, 1.3), 1)])
def test_bounds_fall_short_where_a_ratio_does(ratios: tuple[float, ...], ahead: int) -> None:
    lines = [
        Line(f"block {number}", "float32", {"moestro": Timing((1.0,)), "eager": Timing((value,))}, ("eager",), 1.0, 1.0)
        for number, value in enumerate(ratios)
    ]
    *each, count = bench_training.block_bounds(lines)
    assert [bound["ok"] for bound in each] == [value >= 1 for value in ratios]
    assert count["value"] == ahead
    assert count["ok"] == (ahead >= 2)


def test_the_peak_is_a_rate_that_the_machine_reached() -> None:
    assert bench_training.matmul_peak(torch.float32, size=64, seconds=0.0) > 1e6
