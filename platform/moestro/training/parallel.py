"""Data-parallel training: what a worker has to know of the others. Without a process group there is one worker."""

import torch.distributed as dist
from torch import Tensor


def num_workers() -> int:
    """Workers that train the same model together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This worker's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def total(values: Tensor) -> Tensor:
    """The sum of `values` over all workers; every worker has to call it."""
    if num_workers() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values
