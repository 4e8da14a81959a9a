"""How the router row of an appended expert starts: `ROWS` is the registry.

A start is a function `(config, context) -> rows`: `rows` [L, D] are the new expert's rows in the layers that have
experts, float32; only their directions count. L layers with experts, E experts, D hidden, N windows of S tokens.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moestro.config import CentroidRow, DomainEmbeddingRow, MeanRow, RandomRow, RowConfig, ZeroRow
from moestro.data.packed import PackedTokens
from moestro.errors import InputError
from moestro.mixing.existing import ExistingMoe
from moestro.mixing.starts.hidden_states import (
    Moments,
    TextMoments,
    overall_mean,
    read_text,
    variance_within,
    without_common_part,
)
from moestro.models.checkpoint import load_model
from moestro.models.windows import spread_windows

WINDOW = 256
"""Tokens per calibration window."""


@dataclass(frozen=True)
class RowContext:
    """What a start may look at."""

    moe: ExistingMoe
    domain: str
    """The new expert's."""
    routers: Tensor
    """The rows that are there, [L, E, D]."""
    tokens: Mapping[str, Path]
    """Folders of tokens artifacts by domain: the new one's, and those of domains that it is to be told apart from."""

    def read(self, calibration_tokens: int) -> dict[str, TextMoments]:
        """What the model makes of every domain's tokens.

        Raises `InputError` without those of the new domain and of another: what sets a domain apart is not to be seen
        in its own text, and a row without it points to what all text shares, so that nearly every token chooses it.
        """
        if self.domain not in self.tokens:
            raise InputError(
                f"No tokens of {self.domain} to start its router row from.",
                hint="Hand in its tokens, or take a row that needs none: mean, zero or random.",
            )
        if len(self.tokens) == 1:
            raise InputError(
                f"Only tokens of {self.domain} itself to start its router row from: nothing says what sets it apart.",
                hint="Hand in another domain's tokens too, or take a row that needs none: mean, zero or random.",
            )
        length = min(WINDOW, int(self.moe.config.max_position_embeddings))
        ids = {name: PackedTokens.open(folder, "train").ids for name, folder in self.tokens.items()}
        model = load_model(self.moe.folder)
        return {
            name: read_text(model, [spread_windows(found, length=length, max_tokens=calibration_tokens)])
            for name, found in ids.items()
        }


def new_rows(config: RowConfig, context: RowContext) -> Tensor:
    """The new expert's rows [L, D], each as long as the rows of its layer that are not zero are on average.

    Raises `InputError` if a row is to be scaled where all are zero.
    """
    rows_LD = ROWS[config.type](config, context)
    norms_LE = context.routers.norm(dim=-1)
    lengths_L = norms_LE.sum(dim=-1) / (norms_LE > 0).sum(dim=-1).clamp_min(1)
    unscaled = [layer for layer, row_D in enumerate(rows_LD) if row_D.any() and not lengths_L[layer]]
    if unscaled:
        raise InputError(
            f"All router rows of layer {context.moe.layers[unscaled[0]]} are zero: nothing says how long another is.",
            hint="Take a zero row as well (`router: {type: zero}`), or train the model's router first.",
        )
    return torch.nn.functional.normalize(rows_LD, dim=-1) * lengths_L[:, None]


def _centroid(config: CentroidRow, context: RowContext) -> Tensor:
    """As the mix stage has it: with mu_d the mean of the new domain's hidden states before a layer's experts, mu that
    of all domains handed in and v the variance per feature within them, P (mu_d - mu) / v, where P takes out what is
    along mu."""
    texts = context.read(config.calibration_tokens)

    def row(layer: Mapping[str, Moments]) -> Tensor:
        own_D, mean_D = layer[context.domain].mean, overall_mean(layer)
        return without_common_part(((own_D - mean_D) / variance_within(layer))[None], mean_D)[0]

    return _by_layer(context, texts, row)


def _domain_embedding(config: DomainEmbeddingRow, context: RowContext) -> Tensor:
    """As the mix stage has it: with e_d the mean of the new domain's last hidden states, e that of all domains handed
    in and mu as above, P (e_d - e)."""
    texts = context.read(config.calibration_tokens)
    last = {name: text.last for name, text in texts.items()}
    own_D = last[context.domain].mean

    def row(layer: Mapping[str, Moments]) -> Tensor:
        return without_common_part((own_D - overall_mean(last))[None], overall_mean(layer))[0]

    return _by_layer(context, texts, row)


def _by_layer(
    context: RowContext, texts: Mapping[str, TextMoments], row: Callable[[Mapping[str, Moments]], Tensor]
) -> Tensor:
    layers = [{name: text.layers[layer] for name, text in texts.items()} for layer in context.moe.layers]
    return torch.stack([row(layer) for layer in layers]).float()


def _zero(_config: ZeroRow, context: RowContext) -> Tensor:
    return torch.zeros_like(context.routers[:, 0])


def _mean(_config: MeanRow, context: RowContext) -> Tensor:
    return context.routers.mean(dim=1)


def _random(config: RandomRow, context: RowContext) -> Tensor:
    generator = torch.Generator().manual_seed(config.seed)
    return torch.randn(context.routers[:, 0].shape, generator=generator)


ROWS: dict[str, Callable[[Any, RowContext], Tensor]] = {
    "centroid": _centroid,
    "domain_embedding": _domain_embedding,
    "zero": _zero,
    "mean": _mean,
    "random": _random,
}
"""By `router.type`."""
