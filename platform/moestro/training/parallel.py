"""Data-parallel training: each worker takes its share of every micro-batch, gradients are averaged before the step.

Without a process group there is one worker, and nothing here does anything. Micro-batches are split, not the batch:
what is counted over the micro-batches of a step is then the same for any number of workers.

Shapes: N parameters (the elements of all tensors in a bucket).
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moestro.data.packed import Batch
from moestro.errors import ConfigError, LostWorkerError, ResourceError

BUCKET_ELEMENTS = 8 << 20
"""Gradients are exchanged in flat buffers of about this many elements: few messages, little memory."""


class Followed(BaseException):
    """Raised at the end of training on every worker but the first: what the stage still does is worker 0's alone."""


def num_workers() -> int:
    """Workers that train the same model together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This worker's number, from 0. Worker 0 alone writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def total(values: Tensor) -> Tensor:
    """The sum of `values` over all workers; every worker has to call it."""
    if num_workers() > 1:
        values = values.clone()
        _add_up(values)
    return values


def gathered(values: Tensor) -> Tensor:
    """The rows of all workers after one another, the same on each; every worker has to call it, with equal shapes."""
    if num_workers() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(num_workers())]
    with _peers():
        dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def mean_tensor(values: Tensor) -> Tensor:
    """The mean of `values` over all workers, with a gradient to this worker's own as if there were no others.

    Averaging gradients over workers then makes it the gradient of the mean. Every worker has to call it.
    """
    if num_workers() == 1:
        return values
    own = values.detach()
    return values + (total(own) / num_workers() - own)


def mean(value: float) -> float:
    """The mean of `value` over all workers; every worker has to call it."""
    return float(total(torch.tensor(value, dtype=torch.float64))) / num_workers()


def means(figures: Mapping[str, float]) -> dict[str, float]:
    """The mean of each figure over all workers; every worker has to call it, with the same names."""
    if num_workers() == 1:
        return dict(figures)
    sums = total(torch.tensor(list(figures.values()), dtype=torch.float64)).tolist()
    return {name: value / num_workers() for name, value in zip(figures, sums, strict=True)}


def check_share(batch_size: int, accumulation: int, workers: int) -> None:
    """Raise `ConfigError` if a batch does not divide into equal shares of `workers`."""
    if batch_size % (accumulation * workers):
        raise ConfigError(
            f"training.batch_size: {batch_size} does not divide by {accumulation} (accumulation) x {workers} workers.",
            hint="Choose a multiple, or another resources.branch_workers.",
        )


def share(batch: Batch, accumulation: int) -> Batch:
    """This worker's part of every one of the `accumulation` equal parts of `batch`, in their order."""
    workers = num_workers()
    if workers == 1:
        return batch
    parts = (values.unflatten(0, (accumulation, workers, -1))[:, rank()].flatten(0, 1) for values in batch)
    return Batch(*parts)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every `.grad` by its mean over all workers, the same bits on each.

    A gradient that a worker does not have counts as zero; one that none has stays None.
    """
    if num_workers() == 1:
        return
    parameters = list(parameters)
    present = total(torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.float32))
    found = [parameter for parameter, count in zip(parameters, present.tolist(), strict=True) if count]
    for parameter in found:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets([parameter.grad for parameter in found if parameter.grad is not None]):
        flat_N = torch.cat([gradient.flatten() for gradient in bucket])
        _add_up(flat_N)
        flat_N /= num_workers()
        for gradient, mean_N in zip(bucket, flat_N.split([part.numel() for part in bucket]), strict=True):
            gradient.copy_(mean_N.view_as(gradient))


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors of one type, of `BUCKET_ELEMENTS` together or a single one that is larger."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        full = sum(part.numel() for part in bucket) + tensor.numel() > BUCKET_ELEMENTS
        if bucket and (full or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def broadcast(value: Any) -> Any:
    """Worker 0's `value` (anything that can be pickled), on every worker."""
    if num_workers() == 1:
        return value
    values = [value]
    with _peers():
        dist.broadcast_object_list(values)
    return values[0]


def agreed(value: int | None, what: str) -> int | None:
    """`value`, if all workers have the same one; raises `ResourceError` if what they share has shown them different
    things."""
    if (first := broadcast(value)) != value:
        raise ResourceError(
            f"{what} is {value} on worker {rank()} and {first} on worker 0.",
            hint="The workers do not see the same files: MOESTRO_HOME has to lie on a file system that all share.",
        )
    return value


def only_the_first_goes_on() -> None:
    """Raise `Followed` on every worker but the first."""
    if rank() > 0:
        raise Followed


@contextmanager
def first_worker_first() -> Iterator[None]:
    """Worker 0 does the block before the others do: what it writes, they find. It must not talk to other workers."""
    if rank() > 0:
        broadcast(None)
    yield
    if rank() == 0:
        broadcast(None)


def _add_up(values: Tensor) -> None:
    with _peers():
        dist.all_reduce(values)


@contextmanager
def _peers() -> Iterator[None]:
    """Another worker that is gone is a `LostWorkerError`, whatever the transport calls it."""
    try:
        yield
    except RuntimeError as error:
        words = str(error).splitlines()[0]
        raise LostWorkerError(f"A worker of the group was lost: {words}") from error
