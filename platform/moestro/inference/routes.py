"""Checks on the expert choices that vLLM returns: what is off by a row trains a model on another token's routing.

Row t is the routing of *input* token t, the one that gives the log-probability of token t + 1. P prompt tokens and
O sampled ones give P + O - 1 rows: the last sampled token is never an input.

Shapes: R rows, L layers, K chosen experts, E experts.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moestro.errors import InputError, ResourceError


@dataclass(frozen=True)
class RoutingShape:
    """How a model routes."""

    num_layers: int
    num_experts: int
    num_experts_per_tok: int


def routing_shape(folder: Path) -> RoutingShape | None:
    """How the checkpoint in `folder` routes, None if it is dense. Raises `InputError` without a readable config."""
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / 'config.json'} cannot be read: {error}") from None
    experts = config.get("num_local_experts") or config.get("num_experts")
    if not experts:
        return None
    return RoutingShape(config["num_hidden_layers"], experts, config["num_experts_per_tok"])


def check_routes(routes: Any, *, rows: int, shape: RoutingShape) -> np.ndarray:
    """`routes` as uint8 or uint16 [rows, L, K].

    Raises `ResourceError` if there are none, or their shape, a row's ids or their distinctness is not as it must be.
    """
    if routes is None:
        raise ResourceError("The engine returned no routing for a sequence.", hint="Its request was cut short.")
    routes_RLK = np.asarray(routes)
    expected = (rows, shape.num_layers, shape.num_experts_per_tok)
    if routes_RLK.shape != expected:
        raise ResourceError(f"The engine returned routing of shape {routes_RLK.shape} where {expected} is due.")
    if routes_RLK.size and int(routes_RLK.max()) >= shape.num_experts:
        raise ResourceError(f"The engine routed to expert {int(routes_RLK.max())} of only {shape.num_experts}.")
    ordered_RLK = np.sort(routes_RLK, axis=-1)
    repeated_RL = (ordered_RLK[..., 1:] == ordered_RLK[..., :-1]).any(axis=-1)
    if repeated_RL.any():
        row, layer = (int(index) for index in np.argwhere(repeated_RL)[0])
        raise ResourceError(f"The engine routed row {row} to the same expert twice in layer {layer}: no real capture.")
    return routes_RLK
