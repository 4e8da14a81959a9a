"""Finding routers, experts and feed-forward networks in a model, and counting its parameters.

A sparse layer has a block, `mlp` or, in Granite, `block_sparse_moe`, with a router, `gate` or `router` (`weight`
[E, D], and in GLM-4 the buffer `e_score_correction_bias` [E]), and `experts` (`gate_up_proj` [E, 2F, D], `down_proj`
[E, D, F]). Shared experts are further modules of the block, which every token passes: nothing here counts them as
experts. D hidden, E experts, F intermediate, K chosen experts.
"""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

_ROUTER_WEIGHT = re.compile(
    r"(?:.*\.)?layers\.\d+\.(?:mlp\.(?:gate|shared_expert_gate)|block_sparse_moe\.router)\.weight"
)
_SHARED_EXPERT_WEIGHT = re.compile(r"(?:.*\.)?layers\.\d+\.mlp\.shared_experts?\..+")
_EXPERT_WEIGHT = re.compile(r"(?:.*\.)?layers\.\d+\.(?:mlp|block_sparse_moe)\.experts\..+")


def routers(model: PreTrainedModel) -> list[nn.Module]:
    """The router modules in layer order; empty for a dense model."""
    return [_router(block) for block in _sparse_blocks(model)]


def experts(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that hold all experts of a layer, in layer order; empty for a dense model."""
    return [block.experts for block in _sparse_blocks(model)]


def blocks(model: PreTrainedModel) -> list[Any]:
    """What stands after the attention of each layer, in layer order: a sparse block or a feed-forward network."""
    return [
        layer.block_sparse_moe if hasattr(layer, "block_sparse_moe") else layer.mlp
        for layer in model.get_submodule("model.layers")
    ]


def feed_forwards(model: PreTrainedModel) -> list[nn.Module]:
    """The feed-forward modules of dense layers, in layer order; empty if every layer is sparse."""
    return [block for block in blocks(model) if not hasattr(block, "experts")]


def is_router_weight(name: str) -> bool:
    """Whether a parameter of that name decides which experts a token passes (`...layers.3.mlp.gate.weight`).

    So does the gate of a shared expert: it says how much of that expert a token gets.
    """
    return _ROUTER_WEIGHT.fullmatch(name) is not None


def is_expert_weight(name: str) -> bool:
    """Whether a parameter of that name holds the routed experts of a layer (`...layers.3.mlp.experts.down_proj`)."""
    return _EXPERT_WEIGHT.fullmatch(name) is not None


def is_shared_expert_weight(name: str) -> bool:
    """Whether a parameter of that name is of experts that every token passes (`...mlp.shared_experts.up_proj.weight`).

    The gate of a shared expert is no part of it: `is_router_weight`.
    """
    return _SHARED_EXPERT_WEIGHT.fullmatch(name) is not None


def parameter_counts(model: PreTrainedModel) -> dict[str, int]:
    """`parameters`: all of them, tied ones once; `active_parameters`: those that one token passes through."""
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = 0
    for block in _sparse_blocks(model):
        router, count = _router(block), block.experts.num_experts
        total += sum(bias.numel() for bias in router.buffers())  # stored in checkpoints, though it is not trained
        per_expert = sum(parameter.numel() for parameter in block.experts.parameters()) // count
        idle += per_expert * (count - router.top_k)
    return {"parameters": total, "active_parameters": total - idle}


def num_experts(model: PreTrainedModel) -> int:
    """Routed experts of each sparse layer; 0 for a dense model."""
    found = experts(model)
    return int(found[0].num_experts) if found else 0  # type: ignore[arg-type]


def _router(block: Any) -> Any:
    return block.router if hasattr(block, "router") else block.gate


def _sparse_blocks(model: PreTrainedModel) -> Iterator[Any]:
    return (block for block in blocks(model) if hasattr(block, "experts"))
