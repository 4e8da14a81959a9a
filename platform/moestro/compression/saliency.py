"""What each expert contributes, measured on calibration tokens, and the criteria that rank experts by it.

T tokens, D hidden, E experts, K chosen, L sparse layers, N windows of S tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moestro.models.routers import experts
from moestro.models.windows import forward_windows


class Contribution:
    """Sums over all tokens an expert was chosen for, per layer and expert: float64 [L, E]."""

    def __init__(self, layers: int, num_experts: int) -> None:
        self.tokens = torch.zeros(layers, num_experts, dtype=torch.float64)
        """How many tokens chose it."""
        self.gates = torch.zeros(layers, num_experts, dtype=torch.float64)
        """Sum of its gates."""
        self.outputs = torch.zeros(layers, num_experts, dtype=torch.float64)
        """Sum of gate times the Euclidean norm of its output."""


def reap(contribution: Contribution) -> Tensor:
    """Mean over an expert's tokens of gate times norm of its output; 0 without tokens (arXiv 2510.13999, eq. 9)."""
    return contribution.outputs / contribution.tokens.clamp_min(1)


def frequency(contribution: Contribution) -> Tensor:
    """Tokens that chose the expert."""
    return contribution.tokens


def gate(contribution: Contribution) -> Tensor:
    """Sum of the expert's gates."""
    return contribution.gates


CRITERIA: dict[str, Callable[[Contribution], Tensor]] = {"reap": reap, "frequency": frequency, "gate": gate}
"""Scores [L, E] by the name of the criterion; the highest stay."""


def measure(model: PreTrainedModel, windows_NS: Tensor, into: Contribution) -> None:
    """Add what every expert of `model` contributes on `windows_NS` to `into`.

    An expert's output is computed by the experts module itself, for its tokens alone and with gate 1.
    """
    with _watching(experts(model), into):
        for _ in forward_windows(model, windows_NS):
            pass


@contextmanager
def _watching(modules: list[nn.Module], into: Contribution) -> Iterator[None]:
    def watch(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> None:
            _add_layer(module, *args, into=into, layer=layer)

        return hook

    handles = [module.register_forward_pre_hook(watch(layer)) for layer, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add_layer(
    module: nn.Module, x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor, *, into: Contribution, layer: int
) -> None:
    for expert in ids_TK.unique().tolist():
        rows, slots = torch.where(ids_TK == expert)
        own_ids = torch.full((len(rows), 1), expert, dtype=ids_TK.dtype, device=ids_TK.device)
        # `forward` rather than a call: the hook must not see this.
        output_TD = module.forward(x_TD[rows], own_ids, torch.ones_like(own_ids, dtype=gates_TK.dtype))
        gates_T = gates_TK[rows, slots].double()
        into.tokens[layer, expert] += len(rows)
        into.gates[layer, expert] += gates_T.sum().cpu()
        into.outputs[layer, expert] += (gates_T * output_TD.double().norm(dim=-1)).sum().cpu()
