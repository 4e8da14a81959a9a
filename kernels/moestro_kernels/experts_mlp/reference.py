"""The grouped expert MLP as one reads it in a paper: the truth the fast paths are tested against.

    y_t = sum_k  weights[t, k] * down[e] @ (silu(gate[e] @ x_t) * (up[e] @ x_t)),   e = index[t, k]

SwiGLU after Shazeer 2020 (arXiv 2002.05202), top-k mixture after Shazeer et al. 2017 (arXiv 1701.06538).

Shapes: T tokens, D hidden, E experts, K choices a token, F intermediate, M tokens of one expert.
"""

import torch
from torch.nn import functional


def experts_mlp_reference(
    x_TD: torch.Tensor,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
) -> torch.Tensor:
    """A naive loop over experts, differentiable by autograd in all four floating-point arguments. Returns y [T, D]."""
    y_TD = torch.zeros_like(x_TD)
    for expert, (gate_up_2FD, down_DF) in enumerate(zip(gate_up_E2FD.unbind(0), down_EDF.unbind(0), strict=True)):
        token_M, choice_M = torch.where(index_TK == expert)
        gate_MF, up_MF = functional.linear(x_TD[token_M], gate_up_2FD).chunk(2, dim=-1)
        out_MD = functional.linear(functional.silu(gate_MF) * up_MF, down_DF)
        weighted_MD = out_MD * weights_TK[token_M, choice_M, None]
        y_TD = y_TD.index_add(0, token_M, weighted_MD.to(y_TD.dtype))
    return y_TD
