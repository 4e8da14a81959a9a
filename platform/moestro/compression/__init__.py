"""Expert pruning: the least useful experts of every layer are left out (REAP, arXiv 2510.13999).

`prune` is the stage, `saliency` measures what each expert contributes on calibration tokens.
"""

from moestro.compression.prune import compress

__all__ = ["compress"]
