"""Steering in transformers: what vLLM must answer under a profile.

Routers are reached as `models.routing` reaches them: a hook on each reads what it returned, and gives the profile's
decision in its place, gates and choice by the architecture's own formulas (`models.gating`).

T tokens, E experts, K chosen per token, B sequences of S positions, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moestro.errors import InputError
from moestro.models.gating import GATINGS, Gating, Routed
from moestro.models.routers import num_experts
from moestro.models.routing import known_routers
from moestro.models.steering_profiles import Method, Profile
from moestro.models.steering_rules import Choice, Steer, blended, check_fits, contrast, layer_rules

SERVED = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe")
"""Architectures with softmax routers that choose the K largest, and that vLLM serves by a model of its own."""


def check_steerable(model: PreTrainedModel) -> None:
    """Raise `InputError` for a model whose routers cannot be steered, in transformers or in vLLM."""
    kind = model.config.model_type
    found = known_routers(model)
    if kind not in SERVED or any(GATINGS[type(router)].sigmoid for router in found):
        raise InputError(
            f"A {kind} model cannot be steered.",
            hint=f"Steering is known of softmax routers that choose the K largest: {', '.join(SERVED)}.",
        )


def router_shape(model: PreTrainedModel) -> tuple[int, int, int]:
    """Sparse layers, experts per layer, experts chosen per token."""
    found: list[Any] = list(known_routers(model))
    return len(found), num_experts(model), int(found[0].top_k)


def renormalises(model: PreTrainedModel) -> bool:
    """Whether its routers make the chosen gates add up to one."""
    return bool(getattr(known_routers(model)[0], "norm_topk_prob", True))


@contextmanager
def steered(model: PreTrainedModel, profile: Profile) -> Iterator[None]:
    """In the block every token passes the experts that the profile gives it; contrast: those of its weak pass.

    A route record made in the block sees the steered routing. Raises `InputError` if the profile does not fit.
    """
    check_steerable(model)
    layers, count, top_k = router_shape(model)
    check_fits(profile, layers=layers, num_experts=count, top_k=top_k)
    handles = [
        router.register_forward_hook(_hook(GATINGS[type(router)], rule), prepend=True)
        for router, rule in zip(known_routers(model), layer_rules(profile), strict=True)
        if rule
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(gating: Gating, rule: Steer) -> Callable[..., Any]:
    def replace(router: Any, _args: Any, output: Any) -> Any:
        routed = gating.read(output)

        def route(logits_TE: Tensor) -> Choice:
            if logits_TE is routed.logits:
                return routed.weights, routed.ids
            # Chosen by the edited logits as they are, whatever type the model computes in.
            ids_TK = logits_TE.topk(routed.ids.shape[-1], dim=-1).indices
            edited = Routed(logits_TE, routed.weights, ids_TK)
            return gating.gates(router, edited, ids_TK).to(routed.weights.dtype), ids_TK

        gates_TK, ids_TK = rule(routed.logits, route)
        return gating.output(Routed(routed.logits, gates_TK, ids_TK))

    return replace


@torch.no_grad()
def steered_logits(model: PreTrainedModel, tokens_BS: Tensor, profile: Profile | None, *, ruled: bool = True) -> Tensor:
    """Logits [B, S, V], float32, of sequences under a profile.

    `ruled` False: contrast's before it rules tokens out.
    """
    if profile is None:
        return _logits(model, tokens_BS)
    with steered(model, profile):
        logits_BSV = _logits(model, tokens_BS)
    if profile.method != Method.CONTRAST:
        return logits_BSV
    strong_BSV, beta = _logits(model, tokens_BS), profile.parameters["beta"]
    if not ruled:
        return blended(strong_BSV, logits_BSV, beta)
    return contrast(strong_BSV, logits_BSV, profile.parameters["alpha"], beta)


def _logits(model: PreTrainedModel, tokens_BS: Tensor) -> Tensor:
    return model(input_ids=tokens_BS.to(model.device), use_cache=False).logits.float()


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: Sequence[int], profile: Profile | None, *, max_tokens: int) -> list[int]:
    """The likeliest continuation of `prompt` under a profile, token by token, without a cache."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        logits_V = steered_logits(model, torch.tensor([tokens]), profile)[0, -1]
        tokens.append(int(logits_V.argmax()))
    return tokens[len(prompt) :]
