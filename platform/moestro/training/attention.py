"""Causal attention for short bfloat16 windows on a CPU.

PyTorch's fused CPU kernel is slow in bfloat16 for short rows: at 256 positions, forward and backward of plain batched
products take half its time, and a training step of a small model 30 to 40% less. Their memory grows with the square
of the window, so longer windows, float32, sliding windows and dropout stay with the fused kernel ("sdpa").
Documents of a window that must not see each other come as a mask, which transformers makes of their positions.

Shapes: B sequences, H query heads, G key and value heads, S positions, C channels of a head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "moestro_short_causal"
MAX_POSITIONS = 512


@contextmanager
def training_attention(model: PreTrainedModel, *, dtype: torch.dtype, positions: int) -> Iterator[None]:
    """Give `model` the faster attention for unpadded causal windows of `positions` tokens while in the block."""
    window = getattr(model.config, "sliding_window", None)
    slides = window is not None and window < positions
    drops = bool(getattr(model.config, "attention_dropout", 0.0))
    if dtype != torch.bfloat16 or positions > MAX_POSITIONS or slides or drops:
        yield
        return
    AttentionInterface.register(NAME, short_causal_attention)
    AttentionMaskInterface.register(NAME, _document_mask)
    usual = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(usual)


def short_causal_attention(
    _module: nn.Module,
    query_BHSC: Tensor,
    key_BGSC: Tensor,
    value_BGSC: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """softmax(scaling q k^T + causal mask) v in transformers' signature; returns [B, S, H, C].

    `attention_mask` [B, 1, S, S], bool: what a position sees, causality included; None: all before it. The query heads
    of a group are stacked, so that keys and values are not repeated.
    Raises `ValueError` for dropout, which training on packed windows has not.
    """
    if dropout:
        raise ValueError(f"{NAME} does no dropout")
    B, H, S, C = query_BHSC.shape
    G = key_BGSC.shape[1]
    dtype = value_BGSC.dtype
    with torch.autocast("cpu", enabled=False):
        query = (query_BHSC * scaling).to(dtype).reshape(B * G, H // G * S, C)
        key, value = (tensor.to(dtype).reshape(B * G, S, C) for tensor in (key_BGSC, value_BGSC))
        if attention_mask is None:
            mask = torch.full((S, S), float("-inf"), dtype=dtype).triu(1).repeat(H // G, 1)
            scores = torch.baddbmm(mask.expand(B * G, -1, -1), query, key.transpose(1, 2))
        else:
            hidden_B1SS = torch.zeros(attention_mask.shape, dtype=dtype).masked_fill_(~attention_mask, float("-inf"))
            scores = query.bmm(key.transpose(1, 2))
            scores.view(B, H, S, S).add_(hidden_B1SS)
        attended = torch.softmax(scores, dim=-1).bmm(value)
        return attended.reshape(B, H, S, C).transpose(1, 2).contiguous(), None


def _document_mask(*arguments: Any, **keywords: Any) -> Tensor | None:
    """The mask that transformers asks for: none where it is causal alone, which is built in."""
    if keywords.get("allow_is_causal_skip", True):
        return None
    mask: Tensor = sdpa_mask(*arguments, **keywords)
    return mask
