"""One direction per domain: its mean hidden state before the layer's experts, less the overall mean.

L layers, D hidden, N domains.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from moestro.config import CentroidRouter
from moestro.mixing.starts.context import RouterRows, StartContext
from moestro.mixing.starts.hidden_states import (
    Moments,
    overall_mean,
    read_text,
    variance_within,
    with_unit_spread,
    without_common_part,
)
from moestro.models.checkpoint import load_model


def centroid(config: CentroidRouter, context: StartContext) -> RouterRows:
    """One row [L, D] per domain; all experts made from a domain start from it. The generalist's is zero.

    The dense seed sees all domains with the same eyes. In a layer, with mu_d the mean of domain d, mu the overall mean
    and v the variance per feature within domains,

        row_d = c P (mu_d - mu) / v,   P x = x - mu (mu . x) / (mu . mu)

    (the direction of a linear discriminant with a diagonal covariance). P takes out what all tokens share, so that
    no row is favoured by a constant; c makes the standard deviation of the layer's logits `config.spread`.
    """
    windows, figures = context.windows(config.calibration_tokens)
    seed = load_model(context.folders["seed"])
    texts = {name: read_text(seed, [windows_NS]) for name, windows_NS in windows.items()}
    layers = [{name: text.layers[layer] for name, text in texts.items()} for layer in range(context.layers)]
    rows_LND = config.spread * torch.stack([_directions(layer) for layer in layers]).float()
    return RouterRows(context.by_row({name: rows_LND[:, number] for number, name in enumerate(texts)}), figures)


def _directions(layer: Mapping[str, Moments]) -> Tensor:
    """The rows [N, D] of one layer."""
    means_ND, mean_D = torch.stack([moments.mean for moments in layer.values()]), overall_mean(layer)
    rows_ND = without_common_part((means_ND - mean_D) / variance_within(layer), mean_D)
    return with_unit_spread(rows_ND, layer)
