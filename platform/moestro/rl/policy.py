"""The trainer's side of a token: its log-probability under the policy, with the engine's routing replayed.

Shapes: B sequences, S positions, T = B S tokens, V vocabulary, E experts, L layers, K chosen experts.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moestro.models.routers import experts, routers
from moestro.models.routing import RoutingRecord, own_choices, record_routes, replay_routes
from moestro.rl.rollouts import Rollouts


@contextmanager
def routed(model: PreTrainedModel, rollouts: Rollouts, *, replay: bool) -> Iterator[None]:
    """Run forward and backward passes over `rollouts` in here; with `replay` they route as the engine did."""
    if replay and rollouts.routes_BSLK is not None:
        with replay_routes(model, rollouts.routes_BSLK.flatten(0, 1)):
            yield
    else:
        yield


@contextmanager
def recomputing(model: PreTrainedModel, *, enabled: bool) -> Iterator[None]:
    """With `enabled`, passes in here keep no activations but compute them again, where the model is prepared for it.

    transformers does so for modules in training mode alone. Their children stay in evaluation: dropout or the router's
    jitter would come between a policy and its own old log-probabilities.
    """
    layers = [one for one in model.modules() if enabled and getattr(one, "gradient_checkpointing", False)]
    before = [layer.training for layer in layers]
    try:
        for layer in layers:
            layer.training = True
        yield
    finally:
        for layer, training in zip(layers, before, strict=True):
            layer.training = training


@contextmanager
def head_in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Compute logits in float32 in here, whatever type the rest of the model computes in, as the engine does."""
    head: Any = model.get_output_embeddings()
    if head.weight.dtype == torch.float32:
        yield
        return

    def forward(hidden: Tensor) -> Tensor:
        bias = None if head.bias is None else head.bias.float()
        return nn.functional.linear(hidden.float(), head.weight.float(), bias)

    head.forward = forward
    try:
        yield
    finally:
        del head.forward


def completion_logits(model: PreTrainedModel, rollouts: Rollouts, *, temperature: float) -> tuple[Tensor, int]:
    """float32 logits / temperature from the first completion token on, [B, S - first, V], and `first`."""
    first = int(rollouts.mask_BS.any(dim=0).nonzero()[0])
    positions = torch.arange(first, rollouts.inputs_BS.shape[1])
    with head_in_float32(model):
        output: Any = model(input_ids=rollouts.inputs_BS, logits_to_keep=positions, use_cache=False)
    return output.logits.float() / temperature, first


def logprobs_of(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """Log-probabilities of `targets_BS` in nats, [B, S]."""
    chosen_BS = logits_BSV.gather(-1, targets_BS[..., None]).squeeze(-1)
    return chosen_BS - logits_BSV.logsumexp(dim=-1)


def policy_logprobs(model: PreTrainedModel, rollouts: Rollouts, *, temperature: float) -> Tensor:
    """Log-probabilities of the completions' tokens, [B, S], 0 outside the mask; attached to the graph."""
    logits_BSV, first = completion_logits(model, rollouts, temperature=temperature)
    logprobs_BS = logprobs_of(logits_BSV, rollouts.targets_BS[:, first:])
    padded_BS = nn.functional.pad(logprobs_BS, (first, 0))
    return torch.where(rollouts.mask_BS, padded_BS, 0.0)


@dataclass
class Inspection:
    """What the pass that recomputes the old log-probabilities also tells; sums over one or more micro-batches."""

    entropy: float = 0.0
    """Sum over completion tokens, nats."""
    tokens: int = 0
    routings: int = 0
    """(token, layer) pairs."""
    own_differs: Counter[int] = field(default_factory=Counter)
    """By layer, tokens for which the trainer's router alone would have chosen another set than the engine's."""
    used_differs: int = 0
    """Pairs in which the experts received another set than the engine's: 0 under replay."""

    @property
    def mean_entropy(self) -> float:
        """Nats per token."""
        return self.entropy / max(1, self.tokens)

    @property
    def router_mismatch(self) -> float:
        """Share of (token, layer) pairs whose own choice differs."""
        return self.own_differs.total() / max(1, self.routings)

    def layer_mismatches(self) -> list[float]:
        """By sparse layer, the share of tokens whose own choice differs."""
        count = len(self.own_differs)
        return [self.own_differs[layer] * count / max(1, self.routings) for layer in range(count)]

    @property
    def used_mismatch(self) -> float:
        """Share of (token, layer) pairs whose used experts differ."""
        return self.used_differs / max(1, self.routings)


@torch.no_grad()
def inspect(
    model: PreTrainedModel, rollouts: Rollouts, inspection: Inspection, *, temperature: float, replay: bool
) -> tuple[Tensor, Tensor | None]:
    """The log-probabilities of `policy_logprobs`, detached, and the experts that were used, [B, S, L, K], None in a
    dense model; adds to `inspection`."""
    with ExitStack() as stack:
        stack.enter_context(routed(model, rollouts, replay=replay))
        record = stack.enter_context(record_routes(model)) if routers(model) else RoutingRecord()
        received = stack.enter_context(received_ids(model))
        logits_BSV, first = completion_logits(model, rollouts, temperature=temperature)
    mask_BS = rollouts.mask_BS[:, first:]
    entropy_BS = torch.distributions.Categorical(logits=logits_BSV, validate_args=False).entropy()
    inspection.entropy += float(entropy_BS[mask_BS].sum())
    inspection.tokens += rollouts.tokens
    if rollouts.routes_BSLK is not None:
        _compare(rollouts, own_choices(model, record), received, inspection)
    logprobs_BS = nn.functional.pad(logprobs_of(logits_BSV, rollouts.targets_BS[:, first:]), (first, 0))
    used = torch.stack(received, dim=1).unflatten(0, rollouts.inputs_BS.shape) if received else None
    return torch.where(rollouts.mask_BS, logprobs_BS, 0.0), used


def _compare(rollouts: Rollouts, own: list[Tensor], received: list[Tensor], inspection: Inspection) -> None:
    assert rollouts.routes_BSLK is not None
    real_T = rollouts.real_BS.flatten()
    engine_TLK = rollouts.routes_BSLK.flatten(0, 1)[real_T].sort(dim=-1).values

    def differing(ids: list[Tensor]) -> list[int]:
        ids_TLK = torch.stack(ids, dim=1)[real_T].sort(dim=-1).values
        by_layer: list[int] = (ids_TLK != engine_TLK).any(dim=-1).sum(dim=0).tolist()
        return by_layer

    inspection.routings += engine_TLK.shape[0] * engine_TLK.shape[1]
    inspection.own_differs.update(dict(enumerate(differing(own))))
    inspection.used_differs += sum(differing(received))


@contextmanager
def received_ids(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """The ids [T, K] that reach each layer's experts, in layer order: what really happened, whatever routers say."""
    received: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        received.append(args[1])

    handles = [module.register_forward_pre_hook(keep) for module in experts(model)]
    try:
        yield received
    finally:
        for handle in handles:
            handle.remove()
