"""Finding routers, experts and feed-forward networks in a model, and counting its parameters.

A sparse layer's `mlp` has a `gate` (the router: `weight` [E, D]) and `experts` (`gate_up_proj` [E, 2F, D],
`down_proj` [E, D, F]). D hidden, E experts, F intermediate, K chosen experts.
"""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

_ROUTER_WEIGHT = re.compile(r"(?:.*\.)?layers\.\d+\.mlp\.gate\.weight")


def routers(model: PreTrainedModel) -> list[nn.Module]:
    """The router modules in layer order; empty for a dense model."""
    return [mlp.gate for mlp in _sparse_blocks(model)]


def experts(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that hold all experts of a layer, in layer order; empty for a dense model."""
    return [mlp.experts for mlp in _sparse_blocks(model)]


def feed_forwards(model: PreTrainedModel) -> list[nn.Module]:
    """The feed-forward modules of dense layers, in layer order; empty if every layer is sparse."""
    return [layer.mlp for layer in _layers(model) if not hasattr(layer.mlp, "experts")]


def is_router_weight(name: str) -> bool:
    """Whether a parameter of that name is a router's (`...layers.3.mlp.gate.weight`)."""
    return _ROUTER_WEIGHT.fullmatch(name) is not None


def parameter_counts(model: PreTrainedModel) -> dict[str, int]:
    """`parameters`: all of them, tied ones once; `active_parameters`: those that one token passes through."""
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = 0
    for block in _sparse_blocks(model):
        num_experts = block.experts.num_experts
        per_expert = sum(parameter.numel() for parameter in block.experts.parameters()) // num_experts
        idle += per_expert * (num_experts - block.gate.top_k)
    return {"parameters": total, "active_parameters": total - idle}


def _sparse_blocks(model: PreTrainedModel) -> Iterator[Any]:
    return (layer.mlp for layer in _layers(model) if hasattr(layer.mlp, "experts"))


def _layers(model: PreTrainedModel) -> Any:
    return model.get_submodule("model.layers")
