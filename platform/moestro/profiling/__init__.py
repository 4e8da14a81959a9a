"""Who routes where: which experts the held-out tokens of each domain choose, and how specialised that makes them.

`routing` is the stage, `figures` turns counts into the few numbers people compare.
"""

from moestro.profiling.routing import profile

__all__ = ["profile"]
