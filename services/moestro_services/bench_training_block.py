"""One sparse block, forward and backward, for `moestro bench training`: Moestro's experts against transformers' own.

The block is transformers' Mixtral block with its router; only the name of the experts implementation is exchanged.
Input, router and experts take gradients.

Shapes: T tokens, D hidden, E experts, K choices a token, F intermediate.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from moestro_kernels import experts_mlp
from moestro_kernels.experts_mlp.bench import Shape
from moestro_kernels.timing import Timing, interleaved

OURS = "moestro"
RIVALS = ("grouped_mm", "eager")
COPYING = "batched_mm"
"""Copies an expert's weights for every choice, forward and backward: it takes part with fewer tokens."""
COPIED_BYTES = 256 << 20
HOPELESS = 5.0
"""A rival this many times slower is timed once and takes no part in the rounds."""
NUM_INPUTS = 2
"""Routings, each seen by every implementation before the rounds."""


@dataclass(frozen=True)
class BlockTimes:
    """Timings by implementation; a rival outside the rounds has one."""

    timings: dict[str, Timing]
    rivals: tuple[str, ...]
    """Those that took part in the rounds."""
    share: int
    """`batched_mm` saw one of so many tokens; its time is multiplied by it."""


def measure_block(shape: Shape, dtype: torch.dtype, *, seconds: float, rounds: int) -> BlockTimes:
    """All implementations in turn, for about `seconds` and at least `rounds` rounds, all tensors of `dtype`."""
    experts_mlp.register()
    block = _block(shape, dtype)
    runs = {name: _runner(block, shape, dtype, name) for name in (OURS, *RIVALS)}
    once = {OURS: _once(runs[OURS], hopeless=float("inf"))}
    once |= {name: _once(runs[name], hopeless=HOPELESS * once[OURS]) for name in RIVALS}
    rivals = tuple(name for name in RIVALS if once[name] <= HOPELESS * once[OURS])
    rivals = rivals or (min(RIVALS, key=once.__getitem__),)
    timings = interleaved({name: runs[name] for name in (OURS, *rivals)}, seconds=seconds, min_rounds=rounds)
    share = copied_bytes(shape, dtype) // COPIED_BYTES + 1
    few = replace(shape, tokens=shape.tokens // share)
    copying = share * _once(_runner(block, few, dtype, COPYING), hopeless=float("inf"))
    timings |= {name: Timing((once[name],)) for name in RIVALS if name not in rivals}
    return BlockTimes(timings | {COPYING: Timing((copying,))}, rivals, share)


def copied_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """What one copy of the weights of all choices takes."""
    return 3 * shape.tokens * shape.top_k * shape.hidden * shape.intermediate * dtype.itemsize


def _block(shape: Shape, dtype: torch.dtype) -> Any:
    config = MixtralConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_local_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
    )
    block = MixtralSparseMoeBlock(config).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    return block


def _runner(block: Any, shape: Shape, dtype: torch.dtype, name: str) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(1)
    size = (1, shape.tokens, shape.hidden)
    inputs = [torch.randn(size, generator=generator).to(dtype).requires_grad_() for _ in range(NUM_INPUTS)]
    dy = torch.randn(size, generator=generator).to(dtype)
    turn = 0

    def run() -> None:
        nonlocal turn
        block.experts.config._experts_implementation = name
        x = inputs[turn % NUM_INPUTS]
        turn += 1
        x.grad = None
        block.zero_grad()
        block(x).backward(dy)

    return run


def _once(run: Callable[[], None], *, hopeless: float) -> float:
    """Seconds of the second run; of the first where that took more than twice `hopeless`."""
    first = _timed(run)
    return first if first > 2 * hopeless else _timed(run)


def _timed(run: Callable[[], None]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
