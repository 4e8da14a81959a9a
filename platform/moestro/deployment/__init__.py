"""Deployment: the checkpoint as users will reach it, measured at every gate before any traffic.

`stage` serves and measures, `gates` has one gate a file, `comparison` holds a candidate's figures against the
champion's, `paired` tells a drop of accuracy from noise.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moestro.deployment.stage import deploy as deploy

__all__ = ["deploy"]


def __getattr__(name: str) -> Any:
    # Comparing needs no torch: the stage is loaded when it is asked for.
    if name != "deploy":
        raise AttributeError(f"module 'moestro.deployment' has no attribute {name!r}")
    from moestro.deployment.stage import deploy

    return deploy
