"""`moestro bench training`: what an optimiser step costs, and the sparse block in it, against transformers and PyTorch.

Everything in one process, in interleaved rounds, on the same data and with the same threads. Beside the times stands
which share of the machine's matrix product rate, measured in the same process, the model's products reach.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moestro.config import ModelConfig
from moestro.training.runtime import keep_freed_memory
from moestro_kernels.experts_mlp.bench import Shape
from moestro_kernels.products import product
from moestro_kernels.timing import Timing, ratio
from moestro_services.bench_training_block import COPYING, RIVALS, BlockTimes, measure_block
from moestro_services.bench_training_step import DEFAULT, OURS, StepTimes, Workload, measure_step

SMOLLM2 = ModelConfig(
    vocab_size=4896,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=3,
    num_attention_heads=9,
    num_key_value_heads=3,
)
"""Three of SmolLM2-135M's 30 layers, under a tenth of its vocabulary: the head keeps its share of the step."""
WORKLOADS = tuple(
    Workload(name, model, batch_size, 256, num_experts)
    for name, model, batch_size in (("quickstart", ModelConfig(), 16), ("SmolLM2's width, 3 layers", SMOLLM2, 4))
    for num_experts in (0, 4)
)
SHAPES = (
    Shape(8, 2, 192, 512, 4096),
    Shape(64, 8, 192, 128, 4096),
    Shape(8, 2, 576, 1536, 1024),
    Shape(64, 8, 576, 384, 1024),
)
DTYPES = (torch.float32, torch.bfloat16)
MIN_RATIO = 1.0
WELL_AHEAD = 1.2
SHAPES_WELL_AHEAD = 2
MAX_LOSS_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
COLUMNS = (
    *("what", "dtype", "moestro ms", "grouped_mm ms", "eager ms", "batched_mm ms"),
    *("best rival", "ratio", "quartiles", "rounds", "GFLOP/s", "of peak"),
)
PEAK_SIZE = 2048


@dataclass(frozen=True)
class Line:
    """One row: the loops' or implementations' timings and how many times the best rival's time is Moestro's."""

    what: str
    dtype: str
    timings: Mapping[str, Timing]
    rivals: tuple[str, ...]
    flops: float
    peak: float
    """Of the dtype that the products run in, FLOP/s."""

    @property
    def best(self) -> str:
        """The rival with the least median."""
        return min(self.rivals, key=lambda name: self.timings[name].median)

    @property
    def ratio(self) -> float:
        """Median over the rounds of the best rival's time over Moestro's; a rival timed once counts by that time."""
        ours = self.timings[OURS]
        outside = [self.timings[name].median for name in self.timings if name not in (OURS, *self.rivals)]
        return min([ratio(self.timings[self.best], ours).median, *(seconds / ours.median for seconds in outside)])

    @property
    def cells(self) -> list[str]:
        """In the order of COLUMNS."""
        ours, quartiles = self.timings[OURS], ratio(self.timings[self.best], self.timings[OURS])
        return [
            self.what,
            self.dtype,
            *(self._milliseconds(name) for name in (OURS, *RIVALS, COPYING)),
            self.best,
            f"{quartiles.median:.2f}",
            f"{quartiles.low:.2f}..{quartiles.high:.2f}",
            str(len(ours.seconds)),
            f"{self.flops / ours.median / 1e9:.0f}",
            f"{self.flops / ours.median / self.peak:.0%}",
        ]

    def _milliseconds(self, name: str) -> str:
        if name not in self.timings:
            return "-"
        text = f"{self.timings[name].median * 1e3:.0f}"
        return text if name in (OURS, *self.rivals) else f"({text})"


def bench(
    *,
    workloads: tuple[Workload, ...] = WORKLOADS,
    shapes: tuple[Shape, ...] = SHAPES,
    seconds: float = 1.0,
    rounds: int = 5,
) -> dict[str, Any]:
    """The table `moestro bench` prints; `seconds` and least `rounds` of each of its rows. Some minutes."""
    peaks = {dtype: matmul_peak(dtype) for dtype in DTYPES}
    with keep_freed_memory():
        steps = [
            (workload, dtype, measure_step(workload, dtype, seconds=seconds, rounds=rounds))
            for workload in workloads
            for dtype in DTYPES
        ]
        blocks = [
            (shape, dtype, measure_block(shape, dtype, seconds=seconds, rounds=rounds))
            for shape in shapes
            for dtype in DTYPES
        ]
    step_lines = [_step_line(workload, dtype, taken, peaks) for workload, dtype, taken in steps]
    block_lines = [_block_line(shape, dtype, taken, peaks) for shape, dtype, taken in blocks]
    return {
        "title": "Training: whole optimiser steps, and one sparse block forward and backward, CPU",
        "columns": list(COLUMNS),
        "rows": [line.cells for line in (*step_lines, *block_lines)],
        "bounds": [*_step_bounds(steps, step_lines), *block_bounds(block_lines)],
        "notes": _notes(peaks),
    }


def matmul_peak(dtype: torch.dtype, *, size: int = PEAK_SIZE, seconds: float = 1.0) -> float:
    """FLOP/s of the fastest of many square products of `size`, by PyTorch's route and by Moestro's."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    ways: tuple[Callable[..., torch.Tensor], ...] = (torch.mm, product)
    least, end = float("inf"), time.perf_counter() + seconds
    while least == float("inf") or time.perf_counter() < end:
        for way in ways:
            begin = time.perf_counter()
            way(a, b)
            least = min(least, time.perf_counter() - begin)
    return 2 * size**3 / least


def _step_line(workload: Workload, dtype: torch.dtype, taken: StepTimes, peaks: Mapping[torch.dtype, float]) -> Line:
    rivals = tuple(name for name in taken.timings if name != OURS)
    return Line(str(workload), _name(dtype), taken.timings, rivals, taken.flops, peaks[dtype])


def _block_line(shape: Shape, dtype: torch.dtype, taken: BlockTimes, peaks: Mapping[torch.dtype, float]) -> Line:
    flops = shape.flops(backward=True)
    return Line(f"block, {shape}", _name(dtype), taken.timings, taken.rivals, flops, peaks[dtype])


def _step_bounds(steps: list[tuple[Workload, torch.dtype, StepTimes]], lines: list[Line]) -> Iterator[dict[str, Any]]:
    for (_, dtype, taken), line in zip(steps, lines, strict=True):
        yield _at_least(f"{line.what}, {line.dtype}: time of the plain loop / of {OURS}", line.ratio)
        limit = MAX_LOSS_DIFFERENCE[dtype]
        yield {
            "what": f"{line.what}, {line.dtype}: difference of the first losses, nats",
            "value": taken.loss_difference,
            "limit": f"<= {limit}",
            "ok": taken.loss_difference <= limit,
        }


def block_bounds(lines: list[Line]) -> Iterator[dict[str, Any]]:
    """Each ratio's bound, and last the bound on how many shapes are well ahead."""
    ahead: dict[str, float] = {}
    for line in lines:
        yield _at_least(f"{line.what}, {line.dtype}: time of the best rival / of {OURS}", line.ratio)
        ahead[line.what] = min(ahead.get(line.what, float("inf")), line.ratio)
    count = sum(value >= WELL_AHEAD for value in ahead.values())
    yield {
        "what": f"shapes whose every ratio is at least {WELL_AHEAD}",
        "value": count,
        "limit": f">= {SHAPES_WELL_AHEAD}",
        "ok": count >= SHAPES_WELL_AHEAD,
    }


def _at_least(what: str, value: float) -> dict[str, Any]:
    return {"what": what, "value": round(value, 3), "limit": f">= {MIN_RATIO}", "ok": value >= MIN_RATIO}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _notes(peaks: Mapping[torch.dtype, float]) -> list[str]:
    rates = ", ".join(f"{_name(dtype)} {peak / 1e9:.0f} GFLOP/s" for dtype, peak in peaks.items())
    return [
        f"{torch.get_num_threads()} threads. Fastest product of {PEAK_SIZE}x{PEAK_SIZE} matrices: {rates}.",
        "Times: medians of interleaved rounds. Ratios: medians, and quartiles, of the ratios within a round.",
        f"A step is forward, backward, clipping and AdamW; the plain loop of a dense model stands under {DEFAULT}, "
        "transformers' default, and of a Mixture-of-Experts under each experts implementation.",
        "bfloat16 of a step is autocast over float32 weights; a block's bfloat16 has its weights in bfloat16.",
        "SmolLM2's width: 3 of its 30 layers and a tenth of its vocabulary, so the head keeps its share of a step.",
        "Both sides run with Moestro's settings of the C allocator, which belong to the process: they help both.",
        "GFLOP/s count products with weights, from median times: 6 FLOP per active parameter and token.",
        f"In brackets: {COPYING} once, with so few tokens that its copies of weights fit into memory, times the share "
        "left out; and a rival five times slower than Moestro, once.",
    ]
