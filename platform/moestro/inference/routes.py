"""Checks on the expert choices that vLLM returns: what is off by a row trains a model on another token's routing.

Row t is the routing of *input* token t, the one that gives the log-probability of token t + 1. P prompt tokens and
O sampled ones give P + O - 1 rows: the last sampled token is never an input.

Shapes: R rows, L layers, K chosen experts.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moestro.errors import InputError, ResourceError
from moestro.models.files import read_config
from moestro.models.layouts import routed_experts


@dataclass(frozen=True)
class RoutingShape:
    """How a model routes."""

    num_layers: int
    num_experts: int
    num_experts_per_tok: int
    dense_layers: tuple[int, ...] = ()
    """Layers without experts, which have no routing."""


def routing_shape(folder: Path) -> RoutingShape | None:
    """How the checkpoint in `folder` routes, None if it is dense. Raises `InputError` without a readable config."""
    config = read_config(folder)
    experts = routed_experts(config)
    if not experts:
        return None
    layers = config["num_hidden_layers"]
    return RoutingShape(layers, experts, config["num_experts_per_tok"], _dense_layers(config, layers))


def _dense_layers(config: dict[str, Any], layers: int) -> tuple[int, ...]:
    named = config.get("mlp_only_layers") or ()
    first, step = config.get("first_k_dense_replace", 0), config.get("decoder_sparse_step", 1)
    return tuple(layer for layer in range(layers) if layer < first or layer in named or (layer + 1) % step)


def attention_window(folder: Path) -> int | None:
    """Positions that each layer of the checkpoint in `folder` looks back, None if one of them sees all.

    Raises `InputError` without a readable config.
    """
    config = read_config(folder)
    window = config.get("sliding_window") or 0
    slides = config.get("use_sliding_window", True) and "full_attention" not in (config.get("layer_types") or ())
    return int(window) if window and slides else None


def window_is_wide_enough(folder: Path, max_model_len: int) -> bool:
    """Whether all layers slide, and no sequence of `max_model_len` tokens is longer than their window.

    vLLM can then be told to leave the window out, which changes nothing but that it returns routing.
    """
    window = attention_window(folder)
    return window is not None and max_model_len <= window


def returned_routing(folder: Path, max_model_len: int) -> RoutingShape | None:
    """How the routing looks that vLLM returns for sequences of up to `max_model_len` tokens; None if it returns none.

    It returns none for a dense model, nor (0.30) where no layer keeps all of a sequence in its cache: there every
    layer slides, and `max_model_len` goes beyond the window.
    """
    window = attention_window(folder)
    return None if window is not None and window < max_model_len else routing_shape(folder)


def require_routing(folder: Path, max_model_len: int, *, hint: str) -> RoutingShape:
    """`returned_routing`, or an `InputError` that says why there is none, with `hint` as the way out."""
    shape = returned_routing(folder, max_model_len)
    if shape:
        return shape
    if routing_shape(folder) is None:
        raise InputError(f"{folder} is a dense model: it has no routing to return.", hint=hint)
    raise InputError(
        f"vLLM returns no routing for {folder}: all its layers slide over {attention_window(folder)} positions, and "
        f"sequences have up to {max_model_len}.",
        hint=hint,
    )


def check_routes(routes: Any, *, rows: int, shape: RoutingShape) -> np.ndarray:
    """`routes`, of all layers, as uint8 or uint16 [rows, L, K], L the layers with experts.

    Raises `ResourceError` if there are none, or their shape, a row's ids or their distinctness is not as it must be.
    """
    if routes is None:
        raise ResourceError("The engine returned no routing for a sequence.", hint="Its request was cut short.")
    routes_RLK = np.asarray(routes)
    expected = (rows, shape.num_layers, shape.num_experts_per_tok)
    if routes_RLK.shape != expected:
        raise ResourceError(f"The engine returned routing of shape {routes_RLK.shape} where {expected} is due.")
    if shape.dense_layers:
        routes_RLK = np.delete(routes_RLK, shape.dense_layers, axis=1)
    for expert in (int(routes_RLK.min(initial=0)), int(routes_RLK.max(initial=0))):
        if not 0 <= expert < shape.num_experts:
            raise ResourceError(f"The engine routed to expert {expert} of {shape.num_experts}: no real capture.")
    ordered_RLK = np.sort(routes_RLK, axis=-1)
    repeated_RL = (ordered_RLK[..., 1:] == ordered_RLK[..., :-1]).any(axis=-1)
    if repeated_RL.any():
        row, layer = (int(index) for index in np.argwhere(repeated_RL)[0])
        raise ResourceError(f"The engine routed row {row} to the same expert twice in layer {layer}: no real capture.")
    return routes_RLK
