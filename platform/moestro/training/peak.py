"""How fast this machine multiplies matrices: what model FLOPs utilisation is measured by."""

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from moestro_kernels.products import product

SIZE = 768
"""Width of the square matrices: large enough for the best products, small enough for the caches of a CPU."""
SECONDS = 0.15


def matmul_peak(dtype: torch.dtype) -> float:
    """FLOPs per second of the fastest of several square products in `dtype` with the present number of threads.

    PyTorch's product and, in float32, Moestro's own compete. Measured once per process, dtype and number of threads,
    in about 0.2 s.
    """
    return _measure(dtype, torch.get_num_threads())


@cache
def _measure(dtype: torch.dtype, _threads: int) -> float:
    one = torch.ones(SIZE, SIZE, dtype=dtype)
    products: list[Callable[[Tensor, Tensor], Tensor]] = [torch.mm, product] if dtype == torch.float32 else [torch.mm]
    return 2 * SIZE**3 / min(_seconds(multiply, one, SECONDS / len(products)) for multiply in products)


def _seconds(multiply: Callable[[Tensor, Tensor], Tensor], one: Tensor, budget: float) -> float:
    """The fastest of the products that fit into `budget` seconds, and of at least one."""
    multiply(one, one)  # loads the library and wakes the threads
    best, end = float("inf"), time.perf_counter() + budget
    while best == float("inf") or time.perf_counter() < end:
        started = time.perf_counter()
        multiply(one, one)
        best = min(best, time.perf_counter() - started)
    return best
