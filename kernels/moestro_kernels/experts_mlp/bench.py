"""Times the grouped expert MLP against transformers' own experts implementations, on this machine's CPU.

One process, interleaved rounds, transformers' own `MixtralExperts` module with nothing exchanged but the name of the
implementation. Inputs, router weights and experts all take gradients.

Shapes: T tokens, D hidden, E experts, K choices a token, F intermediate.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moestro_kernels import experts_mlp
from moestro_kernels.timing import Ratio, Timing, interleaved, ratio

OURS = "moestro"
RIVALS = ("grouped_mm", "eager")
# A rival this many times slower than the op is measured once and left out of the rounds.
HOPELESS = 6.0
NUM_ROUTINGS = 4
COLUMNS = (
    *("experts", "dtype", "pass"),
    *(f"{name} ms" for name in (OURS, *RIVALS)),
    *(f"{OURS} GFLOP/s", "rival GFLOP/s", "best rival", "ratio", "quartiles", "ratio of least"),
)


@dataclass(frozen=True)
class Shape:
    """One layer: E experts of D x F, K of them for each of T tokens."""

    num_experts: int
    top_k: int
    hidden: int
    intermediate: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.num_experts}x({self.hidden}x{self.intermediate}) top-{self.top_k} T={self.tokens}"

    def flops(self, *, backward: bool) -> int:
        """Floating-point operations of the matmuls alone."""
        forward = 2 * 3 * self.tokens * self.top_k * self.hidden * self.intermediate
        return forward * 3 if backward else forward


SHAPES = (
    Shape(8, 2, 256, 512, 2048),
    Shape(8, 2, 576, 1536, 1024),
    Shape(64, 8, 512, 256, 1024),
    Shape(4, 2, 192, 512, 4096),
)


@dataclass(frozen=True)
class Measurement:
    """One row: the timings by implementation, and the ratio of the best rival to the op."""

    shape: Shape
    dtype: torch.dtype
    backward: bool
    timings: dict[str, Timing]
    best_rival: str
    ratio: Ratio


def measure(shape: Shape, dtype: torch.dtype, *, backward: bool, seconds: float) -> Measurement:
    """Runs the op and its rivals interleaved for about `seconds`."""
    experts_mlp.register()
    runs = _runs(shape, dtype, backward=backward)
    once = {name: _second_run(run) for name, run in runs.items()}
    kept = {name: run for name, run in runs.items() if once[name] <= HOPELESS * once[OURS] or name == RIVALS[0]}
    for run in kept.values():
        for _ in range(NUM_ROUTINGS):
            run()
    timings = interleaved(kept, seconds=seconds)
    best_rival = min((name for name in kept if name != OURS), key=lambda name: timings[name].median)
    timings |= {name: Timing((once[name],)) for name in runs if name not in kept}
    return Measurement(shape, dtype, backward, timings, best_rival, ratio(timings[best_rival], timings[OURS]))


def bench(*, seconds: float = 1.5) -> dict[str, Any]:
    """The table `moestro bench` prints; `seconds` for each of its 16 rows. Bound: never slower than the best rival."""
    torch.manual_seed(0)
    rows = [
        measure(shape, dtype, backward=backward, seconds=seconds)
        for shape in SHAPES
        for dtype in (torch.float32, torch.bfloat16)
        for backward in (False, True)
    ]
    return {
        "title": "Grouped expert MLP against transformers' experts implementations, CPU",
        "columns": list(COLUMNS),
        "rows": [_row(row) for row in rows],
        "bounds": [
            {
                "what": f"{row.shape} {_name(row.dtype)} {_pass(row)}: time of the best rival / time of {OURS}",
                "value": round(row.ratio.median, 3),
                "limit": ">= 1.0 within the quartiles",
                "ok": row.ratio.high >= 1.0,
            }
            for row in rows
        ],
        "notes": [
            f"{torch.get_num_threads()} threads. Times: medians of interleaved rounds. Ratios: taken within a round.",
            "GFLOP/s count the matmuls and take the least time.",
            f"Every row cycles through {NUM_ROUTINGS} random routings, all seen before the clock starts.",
            "batched_mm is left out: it copies the weights once per choice (4 to 15 GB here).",
            f"A time in brackets is a single run of a rival more than {HOPELESS:g} times slower.",
        ],
    }


def _runs(shape: Shape, dtype: torch.dtype, *, backward: bool) -> dict[str, Callable[[], None]]:
    config = MixtralConfig(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_local_experts=shape.num_experts
    )
    experts = MixtralExperts(config).to(dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    x_TD = torch.randn(shape.tokens, shape.hidden, dtype=dtype, requires_grad=True)
    dy_TD = torch.randn(shape.tokens, shape.hidden, dtype=dtype)
    routings = [_routing(shape) for _ in range(NUM_ROUTINGS)]

    def runner(implementation: str, turns: Iterator[int]) -> Callable[[], None]:
        def run() -> None:
            config._experts_implementation = implementation
            index_TK, weights_TK = routings[next(turns) % NUM_ROUTINGS]
            if not backward:
                with torch.no_grad():
                    experts(x_TD, index_TK, weights_TK)
                return
            for tensor in (*experts.parameters(), x_TD, weights_TK):
                tensor.grad = None
            experts(x_TD, index_TK, weights_TK).backward(dy_TD)

        return run

    return {name: runner(name, iter(range(10**9))) for name in (OURS, *RIVALS)}


def _routing(shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    weights_TK, index_TK = torch.randn(shape.tokens, shape.num_experts).softmax(-1).topk(shape.top_k)
    return index_TK, (weights_TK / weights_TK.sum(-1, keepdim=True)).requires_grad_()


def _second_run(run: Callable[[], None]) -> float:
    run()
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _row(row: Measurement) -> list[str]:
    flops = row.shape.flops(backward=row.backward)
    ours, rival = row.timings[OURS], row.timings[row.best_rival]
    times = [_milliseconds(row.timings[name]) for name in (OURS, *RIVALS)]
    return [
        str(row.shape), _name(row.dtype), _pass(row), *times,
        f"{flops / ours.best / 1e9:.0f}", f"{flops / rival.best / 1e9:.0f}", row.best_rival,
        f"{row.ratio.median:.2f}", f"{row.ratio.low:.2f}..{row.ratio.high:.2f}", f"{rival.best / ours.best:.2f}",
    ]  # fmt: skip


def _milliseconds(timing: Timing) -> str:
    text = f"{timing.median * 1e3:.1f}"
    return f"({text})" if len(timing.seconds) == 1 else text


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _pass(row: Measurement) -> str:
    return "forward+backward" if row.backward else "forward"
