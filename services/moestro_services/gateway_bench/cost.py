"""What the gateway costs: the same load on a server with and without it, in turn."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moestro_kernels.timing import Ratio, Timing, ratio
from moestro_services.gateway_bench.load import Load, Result, Target, run

MIN_THROUGHPUT = 0.97
MAX_MEDIAN_SECONDS = 0.002
MAX_P99_SECONDS = 0.010
MAX_GROWTH = 0.02
"""Of the gateway's memory over the load, from the end of its first round."""


@dataclass(frozen=True)
class Cost:
    """One load on a server, directly and through the gateway, round by round."""

    direct: list[Result]
    gateway: list[Result]
    memory: list[int]
    """Bytes that the gateway's process holds, after the warm-up and after every round through it."""


def measure(load: Load, direct: Target, gateway: Target, rounds: int, memory: Callable[[], int]) -> Cost:
    """`rounds` times both, each first in turn, after a warm-up that counts for nothing."""
    for target in (direct, gateway):
        run(replace(load, targets=(target,), seconds=load.seconds / 3))
    found: dict[str, list[Result]] = {direct.url: [], gateway.url: []}
    held = [memory()]
    for number in range(rounds):
        for target in (direct, gateway) if number % 2 == 0 else (gateway, direct):
            found[target.url] += run(replace(load, targets=(target,)))
        held.append(memory())
    return Cost(found[direct.url], found[gateway.url], held)


def rows(what: str, cost: Cost) -> Iterator[list[Any]]:
    """Two rows of the table."""
    for way, results in (("directly", cost.direct), ("through the gateway", cost.gateway)):
        median, p99 = first_token(results)
        requests = sum(result.answered for result in results)
        failed = sum(sum(result.failed.values()) for result in results)
        yield [what, way, requests, failed, f"{median_speed(results):.0f}", f"{median * 1e3:.1f}", f"{p99 * 1e3:.1f}"]


def throughput(cost: Cost) -> Ratio:
    """The gateway's tokens per second by the server's own, round by round."""
    return ratio(_per_token(cost.direct), _per_token(cost.gateway))


def throughput_bound(cost: Cost) -> dict[str, Any]:
    """The median of `throughput`."""
    found = throughput(cost)
    what = f"tokens/s through the gateway by directly, {len(cost.direct)} rounds [{found.low:.3f}, {found.high:.3f}]"
    return {"what": what, "value": found.median, "limit": f">= {MIN_THROUGHPUT}", "ok": found.median >= MIN_THROUGHPUT}


def latency_bounds(cost: Cost) -> Iterator[dict[str, Any]]:
    """Seconds that the gateway adds up to the first token, in the median and at the 99th percentile."""
    bare, ours = first_token(cost.direct), first_token(cost.gateway)
    limits = (MAX_MEDIAN_SECONDS, MAX_P99_SECONDS)
    for name, theirs, mine, limit in zip(("median", "p99"), bare, ours, limits, strict=True):
        added = (mine - theirs) * 1e3
        what = f"first token, {name}: milliseconds that the gateway adds"
        yield {"what": what, "value": added, "limit": f"<= {limit * 1e3:g}", "ok": added <= limit * 1e3}


def failures_bound(what: str, cost: Cost) -> dict[str, Any]:
    """Requests through the gateway that were not answered to the end."""
    value = sum(sum(result.failed.values()) for result in cost.gateway)
    return {"what": f"{what}: failed requests through the gateway", "value": value, "limit": "= 0", "ok": value == 0}


def memory_bound(cost: Cost) -> dict[str, Any]:
    """How much more memory the gateway holds at the end than after the first round through it."""
    growth = cost.memory[-1] / cost.memory[1] - 1
    what = f"the gateway's memory, growth after the first round ({megabytes(cost)} MB)"
    return {"what": what, "value": growth, "limit": f"<= {MAX_GROWTH}", "ok": growth <= MAX_GROWTH}


def megabytes(cost: Cost) -> str:
    """The gateway's memory after the warm-up and after each round."""
    return ", ".join(f"{held / 1e6:.0f}" for held in cost.memory)


def median_speed(results: list[Result]) -> float:
    """Tokens per second, the median of the rounds."""
    return 1 / _per_token(results).median


def first_token(results: list[Result]) -> tuple[float, float]:
    """Median and 99th percentile of the seconds up to the first token."""
    everything = np.concatenate([result.first_token for result in results])
    median, p99 = np.percentile(everything, (50, 99))
    return float(median), float(p99)


def _per_token(results: list[Result]) -> Timing:
    return Timing(tuple(result.seconds / result.tokens for result in results))
