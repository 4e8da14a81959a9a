"""One pass over all weights in blocks: which hold NaN or infinity, which hold nothing but zeros."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.models.blocks import blocks
from moestro.models.weights import StoredTensor


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
    pairs = [torch.aminmax(block) for block in computable_blocks(tensor)]
    return torch.stack([pair.min for pair in pairs]).amin(), torch.stack([pair.max for pair in pairs]).amax()


def computable_blocks(tensor: StoredTensor) -> Iterator[Tensor]:
    """The tensor in blocks along its first axis, in a type that can be computed with."""
    return (_computable(block) for block in blocks(tensor))


def _computable(block: Tensor) -> Tensor:
    """torch has no least and greatest entry for 8-bit floats, nor for unsigned integers but bytes."""
    small = block.dtype.itemsize == 1 and block.dtype.is_floating_point
    return block.float() if small or block.dtype in {torch.uint16, torch.uint32, torch.uint64} else block
