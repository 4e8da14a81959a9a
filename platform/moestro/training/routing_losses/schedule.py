"""A coefficient that changes linearly over a run."""


def linear(first: float, last: float, step: int, total: int) -> float:
    """From `first` at step 0 to `last` at step `total` - 1; a run of one step has `last`."""
    return last if total <= 1 else first + (last - first) * step / (total - 1)
