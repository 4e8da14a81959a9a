"""Deciding in a router's stead which experts a token takes, while training.

T tokens, D hidden, E experts, K chosen per token, M experts per token after a decision.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moestro.models.gating import GATINGS, Gating, Routed
from moestro.models.routers import experts
from moestro.models.routing import known_routers

Decision = Callable[[int, Any, Gating, Routed], Routed]
"""(layer, router, its gating, what it returned) -> what the experts get. Any number of ids per token will do."""


@contextmanager
def reroute(model: PreTrainedModel, decide: Decision) -> Iterator[None]:
    """In the block, every router's output goes through `decide` in training; a route record sees what became of it.

    In evaluation mode routers decide for themselves: what is measured is what will be served.
    Raises `InputError` for a model without routers that Moestro knows.
    """

    def hook(layer: int, gating: Gating) -> Callable[..., Any]:
        def replace(module: nn.Module, _args: Any, output: Any) -> Any:
            if not module.training:
                return output
            return gating.output(decide(layer, module, gating, gating.read(output)))

        return replace

    handles = [
        router.register_forward_hook(hook(layer, GATINGS[type(router)]), prepend=True)
        for layer, router in enumerate(known_routers(model))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def all_experts(routed: Routed) -> Tensor:
    """The ids of all experts for every token [T, E]: the chosen ones first, in their order, then the others."""
    rest_TE = torch.ones_like(routed.logits, dtype=torch.bool).scatter(1, routed.ids, value=False)
    others = routed.logits.shape[-1] - routed.ids.shape[-1]
    return torch.cat([routed.ids, rest_TE.nonzero()[:, 1].view(len(routed.ids), others)], dim=-1)


@contextmanager
def skip_absent_experts(model: PreTrainedModel) -> Iterator[None]:
    """In the block, a token whose gates beyond its router's K are all 0 passes its first K experts only.

    A decision thus can give some tokens more experts than others, at the cost of the experts they take.
    """
    modules: list[Any] = experts(model)
    for module, router in zip(modules, known_routers(model), strict=True):
        module.forward = _in_two_parts(module.forward, int(router.top_k))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _in_two_parts(forward: Callable[..., Tensor], top_k: int) -> Callable[..., Tensor]:
    """Experts' `forward` that runs tokens of K experts and tokens of M apart."""

    def run(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        wide_T = (top_k_weights[:, top_k:] != 0).any(dim=-1)
        wide, narrow = wide_T.nonzero().squeeze(1), (~wide_T).nonzero().squeeze(1)
        parts = []
        for tokens, width in ((narrow, top_k), (wide, top_k_index.shape[-1])):
            if len(tokens):
                ids, gates = top_k_index[tokens, :width], top_k_weights[tokens, :width]
                parts.append(forward(hidden_states.index_select(0, tokens), ids, gates))
        return torch.cat(parts).index_select(0, torch.cat([narrow, wide]).argsort())

    return run
