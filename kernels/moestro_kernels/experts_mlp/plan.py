"""Which row of an expert-sorted buffer belongs to which choice of which token.

Every fast path works on a buffer whose rows are grouped by expert. A group may be padded to a multiple of
`row_multiple`, for two unlike reasons: a Triton tile must not straddle two experts, and oneDNN compiles one
primitive per shape, so that a few row counts instead of hundreds spare a training run most of that compilation.

Shapes: T tokens, E experts, K choices a token, N = T * K, P rows of the padded buffer (P >= N).
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DispatchPlan:
    """The rows of one padded, expert-sorted buffer, as int64 tensors.

    `token_P` is the token a row holds (T for a padding row), `row_TK` the row of each choice, `starts_E1` the first row
    of each expert and, last, the end of the used rows.
    """

    token_P: torch.Tensor
    row_TK: torch.Tensor
    starts_E1: torch.Tensor


def plan_dispatch(
    index_TK: torch.Tensor, num_experts: int, *, row_multiple: int = 1, num_rows: int | None = None
) -> DispatchPlan:
    """Sorts the T * K choices by expert, keeping the tokens' order within an expert.

    `num_rows` fixes P beforehand (`most_rows` is enough), which spares waiting for a device; None takes what is needed.
    Expert ids are not checked: they must lie in 0 .. num_experts - 1.
    """
    num_tokens, top_k = index_TK.shape
    flat_N = index_TK.reshape(-1).to(torch.int64)
    expert_N, order_N = torch.sort(flat_N, stable=True)
    experts_E1 = torch.arange(num_experts + 1, device=flat_N.device)
    first_E1 = torch.searchsorted(expert_N, experts_E1)
    padded_E = (first_E1.diff() + (row_multiple - 1)) // row_multiple * row_multiple
    starts_E1 = torch.nn.functional.pad(padded_E.cumsum(0), (1, 0))
    slot_N = torch.arange(num_tokens * top_k, device=flat_N.device) + (starts_E1 - first_E1)[expert_N]
    if num_rows is None:
        num_rows = int(starts_E1[-1])
    token_P = torch.full((num_rows,), num_tokens, dtype=torch.int64, device=flat_N.device)
    token_P[slot_N] = order_N // top_k
    row_N = torch.empty_like(slot_N)
    row_N[order_N] = slot_N
    return DispatchPlan(token_P, row_N.view(num_tokens, top_k), starts_E1)


def most_rows(num_choices: int, num_experts: int, row_multiple: int) -> int:
    """The largest number of rows that `num_choices` choices can need, a multiple of `row_multiple`."""
    return (num_choices + num_experts * (row_multiple - 1)) // row_multiple * row_multiple
