"""One pass over all weights in blocks: which hold NaN or infinity, which hold nothing but zeros."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from moestro.models.weights import StoredTensor

BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class Scan:
    """Names of tensors."""

    not_finite: tuple[str, ...]
    """Those with NaN or infinity."""
    zero: frozenset[str]
    """Those whose entries are all zero."""


def scan(weights: Mapping[str, StoredTensor], progress: Callable[[int, int], None]) -> Scan:
    """Read every tensor with elements, in the order of the files. `progress` is told bytes read and bytes in all."""
    ordered = sorted(weights.items(), key=lambda item: (item[1].path, item[1].start))
    total = sum(tensor.length for tensor in weights.values())
    not_finite, zero, done = [], set(), 0
    for name, tensor in ordered:
        if not tensor.length:
            continue
        low, high = extremes(tensor)
        if not low.isfinite() or not high.isfinite():
            not_finite.append(name)
        elif low == high == 0:
            zero.add(name)
        done += tensor.length
        progress(done, total)
    return Scan(tuple(not_finite), frozenset(zero))


def extremes(tensor: StoredTensor) -> tuple[Tensor, Tensor]:
    """Its least and its greatest entry, NaN if it holds one."""
    pairs = [torch.aminmax(block) for block in blocks(tensor)]
    return torch.stack([pair.min for pair in pairs]).amin(), torch.stack([pair.max for pair in pairs]).amax()


def blocks(tensor: StoredTensor) -> Iterator[Tensor]:
    """The tensor in blocks along its first axis, in a type that can be computed with."""
    if not tensor.shape:
        yield _computable(tensor.read())
        return
    rows = max(1, BLOCK_BYTES * tensor.shape[0] // max(1, tensor.length))
    for start in range(0, tensor.shape[0], rows):
        yield _computable(tensor.rows(start, min(start + rows, tensor.shape[0])))


def _computable(block: Tensor) -> Tensor:
    """torch has no least and greatest entry for 8-bit floats, nor for unsigned integers but bytes."""
    small = block.dtype.itemsize == 1 and block.dtype.is_floating_point
    return block.float() if small or block.dtype in {torch.uint16, torch.uint32, torch.uint64} else block


def same(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors have the same type, shape and entries."""
    if (one.code, one.shape) != (other.code, other.shape):
        return False
    if not prod(one.shape):
        return True
    return all(torch.equal(a, b) for a, b in zip(blocks(one), blocks(other), strict=True))
