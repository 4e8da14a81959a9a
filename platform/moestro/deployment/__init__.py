"""Deployment: the checkpoint as users will reach it, compared with transformers before any traffic.

`stage` serves and measures, `parity` has the comparison and its gate.
"""

from moestro.deployment.stage import deploy

__all__ = ["deploy"]
