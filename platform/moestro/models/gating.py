"""How each architecture's router turns logits into scores, choices and gates: one entry per class of router.

With x the logits of a token and I the experts it chooses:
    Mixtral                     p = softmax(x),  I = top-K of p,  gate = p_I / sum p_I
    Qwen2, Qwen3, FlexOlmo,
    OLMoE                       the same, and divided by sum p_I only where the config says norm_topk_prob
    Granite                     I = top-K of x,  gate = softmax(x_I)
    GLM-4, DeepSeek-V3          s = sigmoid(x),  I = top-K of s + b within the best groups (b: correction bias),
                                gate = scaling * s_I / sum s_I, divided only where the config says norm_topk_prob
(arXiv 2412.19437, section 2.1.2: the bias decides the choice, never the gate.)

T tokens, E experts, K chosen per token, G groups.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.flex_olmo.modeling_flex_olmo import FlexOlmoTopKRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

GROUP_SCORE_EXPERTS = 2
"""How many of a group's experts make its score."""
SMALLEST_SUM = 1e-20


@dataclass(frozen=True)
class Routed:
    """What a router returned for T tokens."""

    logits: Tensor
    """[T, E]."""
    weights: Tensor
    """Gates of the chosen experts, [T, K]."""
    ids: Tensor
    """The chosen experts, [T, K]."""


@dataclass(frozen=True)
class Gating:
    """One class of router."""

    gates: Callable[[Any, Routed, Tensor], Tensor]
    """Gates [T, K] of given ids [T, K], from the router and what it returned; its own choices give its own gates."""
    choose: Callable[[Any, Tensor], Tensor]
    """The ids [T, K] it chooses by its logits [T, E], in any order."""
    probabilities: Callable[[Tensor], Tensor]
    """Scores [T, E] that add up to one per token, from logits [T, E]: what balance is measured on."""
    sigmoid: bool = False
    """Whether scores are sigmoids, each expert's for itself, rather than a softmax."""
    ids_first: bool = False
    """Whether it returns (ids, weights, logits) instead of (logits, weights, ids)."""

    def read(self, output: tuple[Tensor, Tensor, Tensor]) -> Routed:
        """The router's output by name."""
        first, weights_TK, last = output
        return Routed(last, weights_TK, first) if self.ids_first else Routed(first, weights_TK, last)

    def output(self, routed: Routed) -> tuple[Tensor, Tensor, Tensor]:
        """`routed` as the router would have returned it."""
        if self.ids_first:
            return routed.ids, routed.weights, routed.logits
        return routed.logits, routed.weights, routed.ids


def _softmax(logits_TE: Tensor) -> Tensor:
    return torch.softmax(logits_TE.float(), dim=-1)


def _largest_logits(router: Any, logits_TE: Tensor) -> Tensor:
    return logits_TE.topk(router.top_k, dim=-1).indices


def _mixtral_gates(_router: Any, routed: Routed, ids_TK: Tensor) -> Tensor:
    probabilities_TK = _softmax(routed.logits).gather(-1, ids_TK)
    return probabilities_TK / probabilities_TK.sum(dim=-1, keepdim=True)


def _qwen_gates(router: Any, routed: Routed, ids_TK: Tensor) -> Tensor:
    probabilities_TK = torch.softmax(routed.logits, dtype=torch.float, dim=-1).gather(-1, ids_TK)
    if router.norm_topk_prob:
        probabilities_TK = probabilities_TK / probabilities_TK.sum(dim=-1, keepdim=True)
    return probabilities_TK.to(routed.logits.dtype)


def _granite_gates(_router: Any, routed: Routed, ids_TK: Tensor) -> Tensor:
    return torch.softmax(routed.logits.gather(-1, ids_TK), dim=-1).type_as(routed.weights)


def _deepseek_gates(router: Any, routed: Routed, ids_TK: Tensor) -> Tensor:
    scores_TK = routed.logits.sigmoid().gather(-1, ids_TK)
    if router.norm_topk_prob:
        scores_TK = scores_TK / (scores_TK.sum(dim=-1, keepdim=True) + SMALLEST_SUM)
    return scores_TK * router.routed_scaling_factor


def _deepseek_choose(router: Any, logits_TE: Tensor) -> Tensor:
    biased_TE = logits_TE.sigmoid() + router.e_score_correction_bias
    grouped_TGE = biased_TE.unflatten(-1, (router.num_group, -1))
    score_TG = grouped_TGE.topk(GROUP_SCORE_EXPERTS, dim=-1).values.sum(dim=-1)
    best = score_TG.topk(router.topk_group, dim=-1).indices
    kept_TG = torch.zeros_like(score_TG, dtype=torch.bool).scatter(-1, best, value=True)
    masked_TGE = grouped_TGE.masked_fill(~kept_TG.unsqueeze(-1), float("-inf"))
    return masked_TGE.flatten(-2).topk(router.top_k, dim=-1).indices


def _normalised_sigmoid(logits_TE: Tensor) -> Tensor:
    """Sigmoids by their sum: the scores of DeepSeek-V3's balance loss (arXiv 2412.19437, eq. 19)."""
    scores_TE = logits_TE.float().sigmoid()
    return scores_TE / (scores_TE.sum(dim=-1, keepdim=True) + SMALLEST_SUM)


MIXTRAL = Gating(gates=_mixtral_gates, choose=_largest_logits, probabilities=_softmax)
QWEN = Gating(gates=_qwen_gates, choose=_largest_logits, probabilities=_softmax)
DEEPSEEK = Gating(gates=_deepseek_gates, choose=_deepseek_choose, probabilities=_normalised_sigmoid, sigmoid=True)

GATINGS: dict[type[nn.Module], Gating] = {
    MixtralTopKRouter: MIXTRAL,
    Qwen2MoeTopKRouter: QWEN,
    Qwen3MoeTopKRouter: QWEN,
    FlexOlmoTopKRouter: QWEN,
    OlmoeTopKRouter: QWEN,
    GraniteMoeTopKRouter: Gating(gates=_granite_gates, choose=_largest_logits, probabilities=_softmax, ids_first=True),
    Glm4MoeTopkRouter: DEEPSEEK,
    DeepseekV3TopkRouter: DEEPSEEK,
}
"""By class of router."""
