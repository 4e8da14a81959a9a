"""The process while it trains: the same bits in every run, and freed memory kept for the next step."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from moestro_kernels.vector_math import settle_vector_math

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_KEPT_BYTES = 2**31 - 1
_TOP_PAD_BYTES = 64 * 2**20
_LARGEST_HEAP_BLOCK = 32 * 2**20


@contextmanager
def deterministic() -> Iterator[None]:
    """Only algorithms that give the same bits in every run with the same number of threads."""
    settle_vector_math()
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # a debugging aid that costs a pass over memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        memory.fill_uninitialized_memory = fill


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Let glibc keep freed blocks while in the block, and give them back at its end.

    By default each large tensor is mapped anew and every page of it faults in again, in every step: 15 to 40% of a
    small model's step. Where the allocator is not glibc, nothing changes.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or not hasattr(library, "malloc_trim"):
        yield
        return
    library.mallopt(_M_MMAP_THRESHOLD, _LARGEST_HEAP_BLOCK)
    library.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    library.mallopt(_M_TOP_PAD, _TOP_PAD_BYTES)
    try:
        yield
    finally:
        library.mallopt(_M_TRIM_THRESHOLD, _TOP_PAD_BYTES)
        library.malloc_trim(0)
