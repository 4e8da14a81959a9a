"""Rows coupled with the experts by weights alone: a row, taken for a token, excites its own expert most.

The expert-router coupling loss (ERC, arXiv 2512.23447) compares how strongly each row excites each expert, by the norm
of what the expert's gate_proj makes of it. Such norms are quadratic forms, |W x|^2 = x (W^T W) x, so of each expert no
more than a D x D matrix is kept, and one layer at a time: experts of any width, or slices that share a row, cost the
same. L layers, N rows, D hidden, F intermediate.
"""

import math

import torch
from torch import Tensor

from moestro.config import ErcRouter
from moestro.mixing.experts import projection
from moestro.mixing.starts.context import RouterRows, StartContext
from moestro.models.coupling import TINY, activation_norms_by_grams, erc_loss, row_noise

STEP = 0.3
"""Length of the first step of a row of length 1; it falls to zero as half a cosine."""


def erc(config: ErcRouter, context: StartContext) -> RouterRows:
    """One row [L, D] per name, from a draw by descent on the loss, layer by layer; all rows have the same length.

    The draw, not the eigenvectors that maximise |W_i r|^2 over the sum of the others': those cost D^3 per expert and
    layer, and rows that descend from them do not reliably end lower. The loss does not tell a row from its negative.
    Figures: `erc_loss`, mean over layers, `before` and `after`, with norms in units of the layer's mean. Experts that
    are alike leave rows as good as drawn.
    """
    names = list(dict.fromkeys(context.plan.rows))
    generator = torch.Generator().manual_seed(config.seed)
    rows_LND = torch.empty(context.layers, len(names), context.hidden)
    before, after = [], []
    for layer in range(context.layers):
        context.progress(layer, context.layers, "router: coupling rows with experts")
        grams_NDD = _grams(context, names, layer)
        drawn_ND = _unit(torch.randn(len(names), context.hidden, generator=generator))
        coupled_ND = couple(drawn_ND, grams_NDD, alpha=config.alpha, steps=config.steps, generator=generator)
        before.append(float(_relative_loss(drawn_ND, grams_NDD, config.alpha)))
        after.append(float(_relative_loss(coupled_ND, grams_NDD, config.alpha)))
        rows_LND[layer] = config.std * math.sqrt(context.hidden) * coupled_ND
    figures = {"before": sum(before) / len(before), "after": sum(after) / len(after)}
    return RouterRows({name: rows_LND[:, number] for number, name in enumerate(names)}, {"erc_loss": figures})


def couple(drawn_ND: Tensor, grams_NDD: Tensor, *, alpha: float, steps: int, generator: torch.Generator) -> Tensor:
    """`drawn_ND`, rows of length 1, after `steps` steps down the ERC loss on the sphere.

    As in the paper steps see proxies of the tokens around a row, r * d with d uniform in [1 - e, 1 + e] and e at first
    half the distance to the nearest other row; it falls to zero with the steps' size, or experts that are nearly alike
    would drown in it. In the paper experts learn too; here they stand, and rows alone could lower the loss by being
    short, or by pointing where no expert reacts: hence the sphere, and norms in units of their mean.
    """
    rows_ND = drawn_ND
    for step in range(steps):
        left = (1 + math.cos(math.pi * step / steps)) / 2
        slope_ND = _slope(rows_ND, 1 + left * row_noise(rows_ND, generator), grams_NDD, alpha)
        along_ND = slope_ND - (slope_ND * rows_ND).sum(1, keepdim=True) * rows_ND
        rows_ND = _unit(rows_ND - left * STEP * along_ND / along_ND.norm(dim=1, keepdim=True).clamp_min(TINY))
    return rows_ND


def _slope(rows_ND: Tensor, factors_ND: Tensor, grams_NDD: Tensor, alpha: float) -> Tensor:
    """Gradient of the proxies' loss with respect to the rows."""
    rows_ND = rows_ND.detach().requires_grad_()
    return torch.autograd.grad(_relative_loss(rows_ND * factors_ND, grams_NDD, alpha), rows_ND)[0]


def _relative_loss(rows_ND: Tensor, grams_NDD: Tensor, alpha: float) -> Tensor:
    """The loss of norms in units of their mean, which neither the rows' length nor the experts' changes."""
    norms_NN = activation_norms_by_grams(rows_ND, grams_NDD)
    return erc_loss(norms_NN / norms_NN.mean(), alpha)


def _unit(rows_ND: Tensor) -> Tensor:
    return rows_ND / rows_ND.norm(dim=1, keepdim=True).clamp_min(TINY)


def _grams(context: StartContext, names: list[str], layer: int) -> Tensor:
    """W^T W [N, D, D] of the experts of every row, W their gate_proj [F, D] one above the other."""
    plan = context.plan
    grams_NDD = torch.zeros(len(names), context.hidden, context.hidden)
    for row, expert in zip(plan.rows, plan.experts, strict=True):
        gate = projection(expert, "gate_proj", layer, expert.width, models=context.models, dtype=torch.float32)
        gate_FD = gate.read()
        grams_NDD[names.index(row)].addmm_(gate_FD.T, gate_FD)
    return grams_NDD
