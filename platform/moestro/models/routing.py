"""Recording which experts every token chooses, and replaying recorded choices (R3, arXiv 2510.11370, section 3).

Both work through hooks on the router modules. A replayed router keeps its live logits; only the discrete choice is
given, and the gates are what `gating` says of the live logits over the given experts, so the gradient reaches the
router through the gates: with x_i the logits of a softmax router and I the experts given for a token,
gate_i = exp(x_i) / sum_{j in I} exp(x_j).

T tokens (batch rows after one another), E experts, K chosen per token, L sparse layers, in layer order.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moestro.errors import InputError
from moestro.models.gating import GATINGS, MIXTRAL, Gating, Routed
from moestro.models.layouts import LAYOUTS
from moestro.models.routers import routers

Output = tuple[Tensor, Tensor, Tensor]
"""What a router returns, in its own order."""


@dataclass
class RoutingRecord:
    """What the routers of the last forward pass decided: one entry per sparse layer, attached to the graph."""

    logits: list[Tensor] = field(default_factory=list)
    """Router logits [T, E]."""
    ids: list[Tensor] = field(default_factory=list)
    """Chosen experts [T, K], in the router's order."""
    weights: list[Tensor] = field(default_factory=list)
    """Their gates [T, K]."""
    gating: Gating = MIXTRAL
    """How these routers turn logits into scores."""

    def routes(self) -> Tensor:
        """The chosen experts of all layers, [T, L, K], as `replay_routes` takes them."""
        return torch.stack(self.ids, dim=1)


@dataclass
class _Passes:
    """Tells the routers' firings of a forward pass from those of a recomputation during backward."""

    count: int
    fired: list[int] = field(default_factory=list)
    running: bool = False
    forwards: int = 0
    recomputed: int = 0

    def begin(self) -> None:
        self.running, self.fired = True, [0] * self.count

    def fire(self, layer: int) -> bool:
        """Note a firing; true if it belongs to a forward pass and not to a recomputation."""
        if self.running:
            self.fired[layer] += 1
        else:
            self.recomputed += 1
        return self.running

    def end(self) -> None:
        self.running = False
        self.forwards += 1
        if self.fired != [1] * self.count:
            raise RuntimeError(f"routers fired {self.fired} times in one forward pass, expected once each")


@contextmanager
def record_routes(model: PreTrainedModel) -> Iterator[RoutingRecord]:
    """Fill the yielded record with the routing of each forward pass made in the block, replacing the one before.

    Under gradient checkpointing the record keeps what the forward pass decided and ignores recomputation.
    Raises `InputError` for a model without routers, `RuntimeError` if a router did not fire exactly once.
    """
    found = known_routers(model)
    gating = GATINGS[type(found[0])]
    record, passes = RoutingRecord(gating=gating), _Passes(len(found))

    def begin(*_: Any) -> None:
        passes.begin()
        record.logits, record.ids, record.weights = [], [], []

    def keep(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Output) -> None:
            if passes.fire(layer):
                routed = gating.read(output)
                record.logits.append(routed.logits)
                record.ids.append(routed.ids)
                record.weights.append(routed.weights)

        return hook

    with _hooks(model, passes, begin) as handles:
        handles.extend(router.register_forward_hook(keep(layer)) for layer, router in enumerate(found))
        yield record


@contextmanager
def replay_routes(model: PreTrainedModel, routes_TLK: Tensor) -> Iterator[None]:
    """Make every router choose exactly the experts of `routes_TLK` (integers [T, L, K]) in forward passes in the block.

    The gates are those of the live logits over the given experts, so replaying a router's own choices changes no bit
    of loss or gradients. A forward pass must bring exactly T tokens (B * S, padding included: give padding any K
    distinct experts). With gradient checkpointing, run backward in the block too, since it routes once more.
    Raises `ValueError` for ids out of range, repeated within a token, or of the wrong shape, and `RuntimeError` if a
    router did not fire exactly once, on exactly T rows, or if no forward pass was made.
    """
    found = known_routers(model)
    _check_routes(routes_TLK, found)
    passes = _Passes(len(found))
    graph = False

    def impose(layer: int, gating: Gating) -> Callable[..., Output]:
        def hook(module: nn.Module, _args: Any, output: Output) -> Output:
            nonlocal graph
            passes.fire(layer)
            routed = gating.read(output)
            graph = graph or routed.logits.requires_grad
            if (tokens := len(routed.logits)) != len(routes_TLK):
                raise RuntimeError(f"router {layer} got {tokens} tokens, the routes are for {len(routes_TLK)}")
            ids_TK = routes_TLK[:, layer].to(device=routed.logits.device, dtype=torch.long)
            return gating.output(Routed(routed.logits, gating.gates(module, routed, ids_TK), ids_TK))

        return hook

    with _hooks(model, passes, passes.begin) as handles:
        for layer, router in enumerate(found):
            handles.append(router.register_forward_hook(impose(layer, GATINGS[type(router)]), prepend=True))
        yield
    if not passes.forwards:
        raise RuntimeError("no forward pass was made while routes were replayed")
    if graph and model.training and model.is_gradient_checkpointing and not passes.recomputed:
        raise RuntimeError("gradient checkpointing routes again in backward: run backward inside replay_routes")


def own_choices(model: PreTrainedModel, record: RoutingRecord) -> list[Tensor]:
    """The experts [T, K] that each router would choose by the recorded logits, in any order, whatever was replayed."""
    return [
        record.gating.choose(router, logits_TE) for router, logits_TE in zip(routers(model), record.logits, strict=True)
    ]


@contextmanager
def _hooks(model: PreTrainedModel, passes: _Passes, begin: Callable[..., None]) -> Iterator[list[Any]]:
    """Mark begin and end of each forward pass; whatever is added to the yielded list is removed again."""
    body = model.base_model
    handles: list[Any] = [
        body.register_forward_pre_hook(lambda *_: begin()),
        body.register_forward_hook(lambda *_: passes.end()),
    ]
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def known_routers(model: PreTrainedModel) -> list[nn.Module]:
    """The routers in layer order; raises `InputError` if there is none, or one of a class unknown to `GATINGS`."""
    found = routers(model)
    unknown = {type(router).__name__ for router in found if type(router) not in GATINGS}
    if not found or unknown:
        what = f"routers of type {', '.join(sorted(unknown))}" if unknown else "no routers"
        raise InputError(
            f"A {model.config.model_type} model has {what}.",
            hint=f"Routing is known of {', '.join(LAYOUTS)}.",
        )
    return found


def _check_routes(routes_TLK: Tensor, found: list[nn.Module]) -> None:
    if routes_TLK.dim() != 3 or routes_TLK.is_floating_point():
        raise ValueError(f"routes must be integers [T, L, K], got {routes_TLK.dtype} {list(routes_TLK.shape)}")
    top_k, num_experts = int(found[0].top_k), int(found[0].num_experts)  # type: ignore[arg-type]
    if routes_TLK.shape[1:] != (len(found), top_k):
        raise ValueError(f"routes are {list(routes_TLK.shape)}, the model has {len(found)} layers and chooses {top_k}")
    if not routes_TLK.numel():
        raise ValueError("routes are empty")
    if routes_TLK.min() < 0 or routes_TLK.max() >= num_experts:
        raise ValueError(
            f"routes name experts {int(routes_TLK.min())} to {int(routes_TLK.max())}, there are {num_experts}"
        )
    ordered_TLK = routes_TLK.sort(dim=-1).values
    if (ordered_TLK[..., 1:] == ordered_TLK[..., :-1]).any():
        raise ValueError("routes name an expert twice for the same token")
