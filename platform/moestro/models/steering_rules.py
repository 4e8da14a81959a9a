"""What steering does to a router's logits and gates, whoever computes the rest: transformers or vLLM.

A rule edits a layer's logits before its softmax router chooses, or the gates after it has chosen:

    suppress S   gate_i = 0 for i in S, gate_j *= sum_I gate / sum_(I without S) gate     (MoTE, arXiv 2502.11096)
    boost B      z_b = max z + margin for b in B                                          (SteerMoE, arXiv 2509.09660)
    language A   z_a += strength * std(z) for a in A                                      (arXiv 2510.04694)
    weak         the expert of one rank alone, its gate renormalised where the router's are (SCMoE, arXiv 2405.14507)

with I the K experts chosen for a token. `contrast` mixes the logits of SCMoE's two passes.

T tokens, E experts, K chosen per token, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moestro.errors import InputError
from moestro.models.steering_profiles import Method, Profile

RULED_OUT = 1e4
"""What is taken off the logits of tokens that contrast rules out. Their probability is exactly 0 in float32, and
among themselves they keep their order, should a later rule (a grammar, a minimum length) forbid all others."""

Choice = tuple[Tensor, Tensor]
"""Gates [T, K] and expert ids [T, K]."""
Route = Callable[[Tensor], Choice]
"""How a router chooses by logits [T, E]."""
Steer = Callable[[Tensor, Route], Choice]
"""How it chooses when steered."""


def layer_rules(profile: Profile) -> list[Steer | None]:
    """The rule of each sparse layer; None where the profile leaves the router alone. Contrast's is its weak pass."""
    return [_layer_rule(profile, experts) for experts in profile.layers]


def _layer_rule(profile: Profile, experts: Sequence[int]) -> Steer | None:
    if profile.method == Method.CONTRAST:
        rank, renormalises = int(profile.parameters["weak_rank"]), profile.renormalises
        return lambda logits_TE, route: weak_choice(logits_TE, route, rank, renormalises=renormalises)
    if not experts:
        return None
    chosen = list(experts)
    if profile.method == Method.SUPPRESS:
        return lambda logits_TE, route: suppressed(*route(logits_TE), chosen)
    if profile.method == Method.BOOST:
        margin = profile.parameters["margin"]
        return lambda logits_TE, route: route(boosted(logits_TE, chosen, margin))
    strength = profile.parameters["strength"]
    return lambda logits_TE, route: route(shifted(logits_TE, chosen, strength))


def suppressed(gates_TK: Tensor, ids_TK: Tensor, experts: Sequence[int]) -> Choice:
    """A choice without the gates of `experts`; the sum of a token's gates stays, unless none is left: then it is 0."""
    out_TK = torch.isin(ids_TK, torch.tensor(experts, device=ids_TK.device, dtype=ids_TK.dtype))
    wide_TK = gates_TK.float()
    kept_TK = wide_TK.masked_fill(out_TK, 0.0)
    left_T1 = kept_TK.sum(dim=-1, keepdim=True)
    scale_T1 = torch.where(left_T1 > 0, wide_TK.sum(dim=-1, keepdim=True) / left_T1, 0.0)
    # A token without such an expert keeps its gates to the bit.
    steered_TK = torch.where(out_TK.any(dim=-1, keepdim=True), kept_TK * scale_T1, wide_TK)
    return steered_TK.to(gates_TK.dtype), ids_TK


def boosted(logits_TE: Tensor, experts: Sequence[int], margin: float) -> Tensor:
    """Logits in which `experts` lie `margin` above each token's largest."""
    steered_TE = logits_TE.float()
    largest_T1 = steered_TE.amax(dim=-1, keepdim=True)
    steered_TE = steered_TE.clone()
    steered_TE[:, list(experts)] = largest_T1 + margin
    return steered_TE


def shifted(logits_TE: Tensor, experts: Sequence[int], strength: float) -> Tensor:
    """Logits in which `experts` have `strength` standard deviations (n - 1) of the token's logits more."""
    steered_TE = logits_TE.float().clone()
    steered_TE[:, list(experts)] += strength * steered_TE.std(dim=-1, keepdim=True)
    return steered_TE


def weak_choice(logits_TE: Tensor, route: Route, rank: int, *, renormalises: bool) -> Choice:
    """One expert per token, the one of `rank` (from 1); what fills the K places has gate 0."""
    gates_TK, ids_TK = route(logits_TE)
    top_k = ids_TK.shape[-1]
    wide_TE = logits_TE.float()
    order_TR = wide_TE.topk(max(rank, top_k), dim=-1).indices
    first_T1 = order_TR[:, rank - 1 : rank]
    others_TR = torch.cat([order_TR[:, : rank - 1], order_TR[:, rank:]], dim=-1)[:, : top_k - 1]
    weak_TK = torch.zeros_like(gates_TK)
    probability_T1 = torch.softmax(wide_TE, dim=-1).gather(-1, first_T1)
    weak_TK[:, :1] = 1.0 if renormalises else probability_T1.to(weak_TK.dtype)
    return weak_TK, torch.cat([first_T1, others_TR], dim=-1).to(ids_TK.dtype)


def contrast(strong_TV: Tensor, weak_TV: Tensor, alpha: float | Tensor, beta: float | Tensor) -> Tensor:
    """(1 + beta) z_strong - beta z_weak in float32; tokens below log(alpha) + max z_strong are ruled out.

    `alpha` and `beta` may be one number per row, [T, 1].
    """
    strong_TV, weak_TV = strong_TV.float(), weak_TV.float()
    floor = torch.log(torch.as_tensor(alpha, device=strong_TV.device)) + strong_TV.amax(dim=-1, keepdim=True)
    return blended(strong_TV, weak_TV, beta) - RULED_OUT * (strong_TV < floor)


def blended(strong_TV: Tensor, weak_TV: Tensor, beta: float | Tensor) -> Tensor:
    """`contrast` before anything is ruled out."""
    return (1 + beta) * strong_TV.float() - beta * weak_TV.float()


def check_fits(profile: Profile, *, layers: int, num_experts: int, top_k: int) -> None:
    """Raise `InputError` unless the profile is one for a model of that shape."""
    found = (len(profile.layers), profile.num_experts, profile.top_k)
    if found != (layers, num_experts, top_k):
        raise InputError(
            f"Steering profile {profile.name!r} is for {found[0]} sparse layers of {found[1]} experts with {found[2]} "
            f"chosen; the model has {layers} of {num_experts} with {top_k}.",
            hint="It belongs to another checkpoint.",
        )
