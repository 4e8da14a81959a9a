"""Deciding in a router's stead which experts a token takes, while training.

T tokens, E experts, K chosen per token.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from moestro.models.gating import GATINGS, Gating, Routed
from moestro.models.routing import known_routers

Decision = Callable[[int, Any, Gating, Routed], Routed]
"""(layer, router, its gating, what it returned) -> what the experts get. Any number of ids per token will do."""


@contextmanager
def reroute(model: PreTrainedModel, decide: Decision) -> Iterator[None]:
    """In the block, every router's output goes through `decide`; a route record sees what became of it.

    Raises `InputError` for a model without routers that Moestro knows.
    """

    def hook(layer: int, gating: Gating) -> Callable[..., Any]:
        def replace(module: nn.Module, _args: Any, output: Any) -> Any:
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
