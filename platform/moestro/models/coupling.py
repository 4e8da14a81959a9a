"""How strongly router rows and experts are coupled, by weights alone: the formulas of the ERC loss.

A row r_i, taken for a token, excites expert j by M[i, j] = |W_j r_i|, the norm of what the expert's gate_proj W_j makes
of it. Coupled is what excites, and is excited by, its own counterpart most (arXiv 2512.23447, section 3).

N rows and experts, D hidden, F intermediate.
"""

import math

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny


def activation_norms(rows_ND: Tensor, gates_NFD: Tensor) -> Tensor:
    """M [N, N] from the experts' gate_proj; differentiable in both, also where a norm is zero."""
    return _norms((rows_ND @ gates_NFD.mT).square().sum(-1))


def activation_norms_by_grams(rows_ND: Tensor, grams_NDD: Tensor) -> Tensor:
    """M [N, N] from W^T W of each row's experts: |W x|^2 = x (W^T W) x. Cheaper where D is smaller than N F."""
    return _norms((rows_ND @ grams_NDD * rows_ND).sum(-1))


def _norms(squares_NN: Tensor) -> Tensor:
    """From squares [j, i] to norms [i, j]."""
    return squares_NN.clamp_min(TINY).sqrt().T


def erc_loss(norms_NN: Tensor, alpha: float) -> Tensor:
    """1/N^2 sum over i and j != i of max(M_ij - a M_ii, 0) + max(M_ji - a M_ii, 0) (arXiv 2512.23447, `L_ERC`).

    Zero once every row excites its own expert, and every expert is excited by its own row, 1/a times as much as any
    other.
    """
    own_N1 = alpha * norms_NN.diagonal()[:, None]
    excess_NN = torch.relu(norms_NN - own_N1) + torch.relu(norms_NN.T - own_N1)
    return (excess_NN - torch.diag(excess_NN.diagonal())).sum() / len(norms_NN) ** 2


def row_noise(rows_ND: Tensor, generator: torch.Generator) -> Tensor:
    """Relative deviations [N, D] of a token near each row, uniform in [-e_i, e_i] with e_i = |r_i - r_j| / (2 |r_i|).

    r_j is the nearest other row: r_i (1 + noise) stays nearer to r_i. Constants: no gradient flows into e.
    """
    if len(rows_ND) < 2:
        return torch.zeros_like(rows_ND)
    rows_ND = rows_ND.detach()
    distances_NN = (rows_ND[:, None] - rows_ND).norm(dim=-1).fill_diagonal_(math.inf)
    reach_N1 = distances_NN.min(dim=1, keepdim=True).values / (2 * rows_ND.norm(dim=1, keepdim=True).clamp_min(TINY))
    uniform_ND = torch.rand(rows_ND.shape, generator=generator, dtype=rows_ND.dtype)
    return reach_N1 * (2 * uniform_ND - 1)


def diagonal_dominance(norms_NN: Tensor) -> tuple[float, float]:
    """Share of rows i whose M_ii is the largest of row and column i, and by how much it is on average.

    The latter is the mean of M_ii less the largest other of row and column, in units of the mean M; below zero where
    others dominate, and zero where there is no other.
    """
    if len(norms_NN) < 2:
        return 1.0, 0.0
    own_N = norms_NN.diagonal()
    others_NN = norms_NN - torch.diag(torch.full_like(own_N, math.inf))
    largest_N = torch.maximum(others_NN.amax(dim=0), others_NN.amax(dim=1))
    margin = (own_N - largest_N).mean() / norms_NN.mean()
    return float((own_N > largest_N).double().mean()), float(margin)
