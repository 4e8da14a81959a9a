"""Where each Mixture-of-Experts architecture keeps its parts in a checkpoint that transformers saves and vLLM reads.

Names are templates of `{layer}` and `{expert}`. Shapes: router [E, D]; gate_proj and up_proj [F, D], down_proj [D, F];
fused layouts hold all experts of a layer in gate_up_proj [E, 2F, D] (gate above up) and down_proj [E, D, F].
E experts, D hidden, F intermediate.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moestro.errors import InputError

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
DRAFT_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers")
"""Config fields with the number of layers behind the last one, which draft further tokens."""
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The parts of one architecture's sparse layers."""

    model_type: str
    num_experts: str
    """Config field with the number of routed experts."""
    expert_width: str
    """Config field with the width F of a routed expert."""
    router: str
    """The router's weight."""
    experts: Mapping[str, str]
    """A template per projection; in a fused layout the keys are `gate_up_proj` and `down_proj`."""
    fused: bool = False
    """Whether all experts of a layer lie in one tensor."""
    shared: Mapping[str, str] | None = None
    """The shared expert's projections."""
    shared_width: str | None = None
    """Config field with the shared expert's width."""
    shared_counts_experts: bool = False
    """Whether that field counts routed experts' widths instead of features."""
    shared_gate: str | None = None
    """Weight [1, D] of the sigmoid gate of the shared expert."""
    correction_bias: str | None = None
    """Per-expert bias [E] of the choice, float32."""
    renormalises: str | None = None
    """Config field that says whether the chosen gates are made to add up to one; None: they always are."""


def _mlp(expert: str) -> dict[str, str]:
    return {name: f"model.layers.{{layer}}.mlp.{expert}.{name}.weight" for name in PROJECTIONS}


_GATE = "model.layers.{layer}.mlp.gate.weight"
_SPARSE = "model.layers.{layer}.block_sparse_moe."

LAYOUTS: dict[str, Layout] = {
    layout.model_type: layout
    for layout in (
        Layout(
            model_type="mixtral",
            num_experts="num_local_experts",
            expert_width="intermediate_size",
            router=_SPARSE + "gate.weight",
            experts={
                "gate_proj": _SPARSE + "experts.{expert}.w1.weight",
                "up_proj": _SPARSE + "experts.{expert}.w3.weight",
                "down_proj": _SPARSE + "experts.{expert}.w2.weight",
            },
        ),
        Layout(
            model_type="qwen2_moe",
            num_experts="num_experts",
            expert_width="moe_intermediate_size",
            router=_GATE,
            experts=_mlp("experts.{expert}"),
            shared=_mlp("shared_expert"),
            shared_width="shared_expert_intermediate_size",
            shared_gate="model.layers.{layer}.mlp.shared_expert_gate.weight",
            renormalises="norm_topk_prob",
        ),
        Layout(
            model_type="qwen3_moe",
            num_experts="num_experts",
            expert_width="moe_intermediate_size",
            router=_GATE,
            experts=_mlp("experts.{expert}"),
            renormalises="norm_topk_prob",
        ),
        Layout(
            model_type="flex_olmo",
            num_experts="num_experts",
            expert_width="intermediate_size",
            router=_GATE,
            experts=_mlp("experts.{expert}"),
            renormalises="norm_topk_prob",
        ),
        Layout(
            model_type="olmoe",
            num_experts="num_experts",
            expert_width="intermediate_size",
            router=_GATE,
            experts=_mlp("experts.{expert}"),
            renormalises="norm_topk_prob",
        ),
        Layout(
            model_type="granitemoe",
            num_experts="num_local_experts",
            expert_width="intermediate_size",
            router=_SPARSE + "router.layer.weight",
            experts={
                "gate_up_proj": _SPARSE + "input_linear.weight",
                "down_proj": _SPARSE + "output_linear.weight",
            },
            fused=True,
        ),
        Layout(
            model_type="glm4_moe",
            num_experts="n_routed_experts",
            expert_width="moe_intermediate_size",
            router=_GATE,
            experts=_mlp("experts.{expert}"),
            shared=_mlp("shared_experts"),
            shared_width="n_shared_experts",
            shared_counts_experts=True,
            correction_bias="model.layers.{layer}.mlp.gate.e_score_correction_bias",
            renormalises="norm_topk_prob",
        ),
    )
}
"""By `model_type`. OLMoE is read and checked, never made: vLLM never renormalises its gates, whatever is configured."""


EXPERT_COUNTS = tuple(dict.fromkeys(layout.num_experts for layout in LAYOUTS.values()))
"""Config fields that hold the number of routed experts, in one architecture or another."""


def layer_part(name: str) -> tuple[int, str] | None:
    """The number of the layer that a weight called `name` belongs to, and what it is there; None outside layers."""
    match = _LAYER.fullmatch(name)
    return (int(match[1]), match[2]) if match else None


def routed_experts(config: Mapping[str, Any]) -> int:
    """Routed experts per layer of a parsed config.json, 0 for a dense model.

    Raises `InputError` if the field holds something else than a number of experts.
    """
    field = next((field for field in EXPERT_COUNTS if config.get(field)), None)
    if field is None:
        return 0
    count = config[field]
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise InputError(f"{field} is {count!r} in config.json, no number of experts.", hint=f"Correct {field}.")
    return count


def layout_of(config: Mapping[str, Any]) -> Layout:
    """The layout of a parsed MoE config; raises `InputError` naming what it is and what is known."""
    kind = str(config.get("model_type"))
    if kind in LAYOUTS:
        return LAYOUTS[kind]
    raise InputError(
        f"The layout of checkpoints of model_type {kind!r} is not known.",
        hint=f"Known Mixture-of-Experts: {', '.join(LAYOUTS)}.",
    )
