"""Stored tensors a block at a time, for work that must not hold a whole one."""

from collections.abc import Iterator

import torch
from torch import Tensor

from moestro.models.weights import StoredTensor

BLOCK_BYTES = 16 << 20


def blocks(tensor: StoredTensor) -> Iterator[Tensor]:
    """The tensor in parts along its first axis, each of about `BLOCK_BYTES` or of one entry; none of an empty one."""
    if not tensor.length:
        return
    if not tensor.shape:
        yield tensor.read()
        return
    rows = max(1, BLOCK_BYTES * tensor.shape[0] // tensor.length)
    for start in range(0, tensor.shape[0], rows):
        yield tensor.rows(start, min(start + rows, tensor.shape[0]))


def same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors have the same type, shape and bits."""
    if (one.code, one.shape) != (other.code, other.shape):
        return False
    pairs = zip(blocks(one), blocks(other), strict=True)
    return all(torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)) for a, b in pairs)
