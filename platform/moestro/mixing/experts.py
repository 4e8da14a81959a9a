"""An expert's weights, made from its plan: pieces put together, drawn anew, scaled, padded.

D hidden, F intermediate, S features drawn anew.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from moestro.errors import InputError
from moestro.mixing.plan import ExpertPlan, Piece, Redraw
from moestro.models.families import FEED_FORWARD, feed_forward_part
from moestro.models.weights import NewTensor, StoredTensor, StoredWeights, check_fits


def feed_forward_width(name: str, weights: StoredWeights) -> int:
    """The width F of all feed-forward networks of the dense model called `name`.

    Raises `InputError` if it has none, or if its layers are not alike.
    """
    axes = {stored: _feature_axis(part[1]) for stored in weights if (part := feed_forward_part(stored))}
    widths = {weights[stored].shape[axis] for stored, axis in axes.items()}
    if len(widths) != 1:
        raise InputError(
            f"The feed-forward networks of {name} have widths {sorted(widths)}.",
            hint="Experts are as wide in every layer: choose a model whose layers are alike.",
        )
    return widths.pop()


def projection(
    plan: ExpertPlan,
    name: str,
    layer: int,
    width: int,
    *,
    models: Mapping[str, StoredWeights],
    dtype: torch.dtype,
) -> NewTensor:
    """The projection `name` (gate_proj, up_proj [F, D] or down_proj [D, F]) of an expert of `width` F, to be written.

    A whole, unscaled network of the right type and width is copied byte for byte.
    """
    stored = [(piece, models[piece.source][FEED_FORWARD[name].format(layer=layer)]) for piece in plan.pieces]
    first, axis = stored[0][1], _feature_axis(name)
    hidden = first.shape[1 - axis]
    shape = (hidden, width) if axis else (width, hidden)
    factor = 1.0 if name == "gate_proj" else factors(plan.scale)[name]
    whole = len(stored) == 1 and plan.redraw is None and first.shape == shape and stored[0][0].width == width
    if whole and factor == 1.0 and first.dtype == dtype:
        return NewTensor.copy(first)

    def blocks() -> Iterator[Tensor]:
        made = _put_together(stored, axis, shape, dtype)
        if plan.redraw:
            _draw_anew(made.narrow(axis, 0, plan.width), plan.redraw, name, layer)
        sources = " and ".join(dict.fromkeys(piece.source for piece in plan.pieces))
        yield check_fits(made.mul_(factor).to(dtype), f"{name} of an expert made from {sources} in layer {layer}")

    return NewTensor(dtype, shape, blocks)


def factors(scale: float) -> dict[str, float]:
    """Factors of up_proj and down_proj whose product is `scale`: exact powers of two where `scale` is one."""
    exponent = math.log2(scale)
    if exponent.is_integer():
        half = math.ceil(exponent / 2)
        return {"up_proj": 2.0**half, "down_proj": 2.0 ** (exponent - half)}
    return {"up_proj": math.sqrt(scale), "down_proj": math.sqrt(scale)}


def redrawn_features(redraw: Redraw, layer: int, width: int) -> Tensor:
    """The features [S] of an expert of `width` that are drawn anew in `layer`: the same ones in all its projections."""
    generator = _generator(redraw, layer, "features")
    return torch.randperm(width, generator=generator)[: round(redraw.ratio * width)]


def _put_together(
    stored: Sequence[tuple[Piece, StoredTensor]], axis: int, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """All pieces side by side along the features' axis, zeros behind them, in the widest of all types."""
    for _, tensor in stored:
        dtype = torch.promote_types(dtype, tensor.dtype)
    made, start = torch.zeros(shape, dtype=dtype), 0
    for piece, tensor in stored:
        features = tensor.read()[:, piece.start : piece.stop] if axis else tensor.rows(piece.start, piece.stop)
        made.narrow(axis, start, piece.width).copy_(features)
        start += piece.width
    return made


def _draw_anew(features: Tensor, redraw: Redraw, name: str, layer: int) -> None:
    """Replace the weights of some features by draws with the mean and standard deviation of what they replace."""
    axis = _feature_axis(name)
    drawn_S = redrawn_features(redraw, layer, features.shape[axis])
    if not len(drawn_S):
        return
    replaced = features.index_select(axis, drawn_S).float()
    # NumPy sums in one fixed order, torch in one that changes with the number of threads.
    mean = float(replaced.numpy().mean(dtype=np.float64))
    deviation = float(replaced.numpy().std(dtype=np.float64))
    drawn = torch.randn(replaced.shape, generator=_generator(redraw, layer, name)).mul_(deviation).add_(mean)
    features.index_copy_(axis, drawn_S, drawn.to(features.dtype))


def _generator(redraw: Redraw, layer: int, purpose: str) -> torch.Generator:
    """A generator of its own for every layer, expert and purpose: the order of writing changes nothing."""
    key = f"{redraw.seed}/{layer}/{redraw.expert}/{purpose}".encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1)


def _feature_axis(name: str) -> int:
    return 1 if name == "down_proj" else 0
