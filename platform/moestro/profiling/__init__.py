"""Who routes where: which experts the held-out tokens of each domain choose, and how specialised that makes them.

`routing` is the stage, `figures` turns counts into the few numbers people compare. `loads` and `drift` are for the
counts of served traffic; they need numpy alone, and importing the package does not import torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moestro.profiling.routing import profile as profile

__all__ = ["profile"]


def __getattr__(name: str) -> Any:
    if name != "profile":
        raise AttributeError(f"module 'moestro.profiling' has no attribute {name!r}")
    from moestro.profiling.routing import profile

    return profile
