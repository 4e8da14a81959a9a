"""Model FLOPs: what the products of a training step need, whatever the machine or the implementation spends.

Per token, with N the active parameters that are multiplied with it, as in PaLM (arXiv 2204.02311, appendix B):
    F = 6 N + 12 sum over layers of H C v
H query heads, C channels of a head, v the mean number of positions that a token sees: (S + 1) / 2 for causal attention
over S positions, less where a window slides. PaLM counts S, that is also what the mask hides.

6 N: 2 operations per parameter forward, 2 for the gradient by the input, 2 for the gradient by the weight. The last are
left out for parameters that do not train. 12: two products (q k^T, and weights by values) of 2 operations per channel
and position, forward and, twice that, backward.

N counts every matrix that a token passes: of routed experts the K chosen ones, shared experts, routers, and the output
head, also where it is tied to the embedding. The embedding itself is looked up, not multiplied. What a routing loss
adds (such as all experts for `mutual_information`) and the optimiser's work, linear in the parameters, are left out.
"""

from collections.abc import Iterator
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from moestro.models.routers import experts, routers

FORWARD_AND_INPUT, WEIGHT = 4, 2
"""Operations per parameter and token: forward and gradient by the input, and gradient by the weight."""
ATTENTION = 12


def training_flops(model: PreTrainedModel, sequence_length: int) -> float:
    """Model FLOPs of training on one token of a sequence of that length, forward and backward."""
    products = sum(
        share * parameter.numel() * (FORWARD_AND_INPUT + WEIGHT * parameter.requires_grad)
        for share, parameter in _multiplied(model)
    )
    return float(products + attention_flops(model.config, sequence_length))


def attention_flops(config: Any, sequence_length: int) -> float:
    """The part of attention that has no parameters, per token, forward and backward."""
    channels = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return sum(
        ATTENTION * config.num_attention_heads * channels * _seen(window, sequence_length)
        for window in _windows(config)
    )


def _multiplied(model: PreTrainedModel) -> Iterator[tuple[float, nn.Parameter]]:
    """Every matrix and the share of it that a token is multiplied with."""
    found: list[tuple[Any, Any]] = list(zip(routers(model), experts(model), strict=True))
    for router, held in found:
        yield 1.0, router.weight
        share = router.top_k / held.num_experts
        yield from ((share, parameter) for parameter in held.parameters() if parameter.dim() > 2)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            yield 1.0, cast("nn.Parameter", module.weight)


def _windows(config: Any) -> list[int | None]:
    """The sliding window of each layer; None where a token sees everything before it."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _seen(window: int | None, length: int) -> float:
    """Positions that a token sees, mean over a sequence."""
    if window is None or window >= length:
        return (length + 1) / 2
    return (window * (window + 1) / 2 + (length - window) * window) / length
