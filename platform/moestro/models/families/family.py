"""`Family`: how one dense architecture becomes one Mixture-of-Experts architecture that computes the same."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedConfig

from moestro.errors import InputError
from moestro.models.families.rope import carried_rope
from moestro.models.layouts import PROJECTIONS, Layout

SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_dropout",
    "dtype",
)
"""Config fields that mean the same in a dense model and its MoE, besides the rotary embedding's."""
FEED_FORWARD = {name: f"model.layers.{{layer}}.mlp.{name}.weight" for name in PROJECTIONS}
"""Where dense models keep their feed-forward networks: `down(act(gate x) * up x)`."""


@dataclass(frozen=True, kw_only=True)
class MoeShape:
    """What the result must hold, whatever its architecture."""

    num_experts: int
    num_experts_per_tok: int
    """Routed experts chosen per token."""
    expert_width: int
    """Intermediate size of each routed expert."""
    shared_width: int = 0
    """Intermediate size of the shared expert; 0: there is none."""
    loss_free: bool = False
    """Sigmoid scores with a correction bias."""
    num_groups: int = 1
    num_groups_per_tok: int = 1


@dataclass(frozen=True)
class Refusal:
    """Why an MoE architecture cannot be made from a dense config in the shape asked for."""

    field: str
    """The field and its value, as `mlp_bias = true`, or what of the shape it does not have."""
    way_out: str
    """What can be done about it."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """Something that a dense config may have and an MoE architecture cannot carry."""

    what: str
    """In words, for the documentation."""
    found: Callable[[Any], str | None]
    """The field and its value, as `mlp_bias = true`, if a config has it, else None."""
    way_out: str
    """What can be done about it."""


@dataclass(frozen=True)
class Added:
    """A tensor of the MoE that the dense model stores nowhere."""

    shape: tuple[int, ...]
    copy_of: str | None = None
    """The dense tensor it repeats; None: zeros."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A dense architecture and the MoE architecture that holds its layers unchanged; other weights keep their names."""

    dense: str
    """`model_type` of the dense model."""
    layout: Layout
    """The MoE's layout."""
    config: type[PreTrainedConfig]
    """Config class of the MoE."""
    keeps: tuple[str, ...]
    """What of the dense model, beyond the common, the MoE carries: in words, for the documentation."""
    limits: tuple[Limit, ...]
    """What it cannot carry."""
    fields: Callable[[Any, MoeShape], dict[str, Any]]
    """Config fields of the MoE besides the shared ones and the number of experts and their width."""
    vllm: Literal["native", "transformers"] = "native"
    """What serves it: vLLM's own class, or its backend on top of transformers."""
    loss_free: bool = False
    """Whether it can select by sigmoid scores with a correction bias, in groups."""
    added: Callable[[Any], Mapping[str, Added]] = field(default=lambda _dense: {})
    """Tensors outside the experts that the MoE stores and the dense model does not, from the dense config."""

    @property
    def moe(self) -> str:
        """`model_type` of the MoE."""
        return self.layout.model_type

    def refuse(self, dense: Any) -> list[Refusal]:
        """What in a dense config the MoE architecture cannot express; empty if nothing."""
        return [Refusal(found, limit.way_out) for limit in self.limits if (found := limit.found(dense))]

    def lacks(self, shape: MoeShape) -> list[Refusal]:
        """What of a shape the MoE architecture does not have; empty if it carries all of it."""
        found = []
        if shape.shared_width and self.layout.shared is None:
            found.append(Refusal("no shared expert", "Set mix.generalist to expert."))
        if (shape.loss_free or shape.num_groups > 1) and not self.loss_free:
            found.append(Refusal("no loss-free selection", "Set mix.selection to softmax and leave out groups."))
        return found

    def shared_width(self, shape: MoeShape) -> int:
        """Width the shared expert is stored with: that of `shape`, rounded up where only whole experts are counted.

        There it is at least one, of zeros if none is asked for: vLLM's process ends over a shared expert of width 0.
        """
        if not self.layout.shared_counts_experts:
            return shape.shared_width
        return max(1, -(-shape.shared_width // shape.expert_width)) * shape.expert_width

    def moe_config(self, dense: Any, shape: MoeShape) -> PreTrainedConfig:
        """The MoE's config: that of `dense` with sparse layers of `shape`.

        Raises `InputError` naming every field of `dense` that the MoE architecture cannot express, and the way out.
        """
        if refusals := self.refuse(dense):
            raise InputError(
                f"A {self.dense} model with {'; '.join(item.field for item in refusals)} cannot become a {self.moe}.",
                hint=" ".join(dict.fromkeys(item.way_out for item in refusals)),
            )
        carried = {name: getattr(dense, name) for name in SHARED_FIELDS if hasattr(dense, name)}
        sizes = {
            self.layout.num_experts: shape.num_experts,
            self.layout.expert_width: shape.expert_width,
            "num_experts_per_tok": shape.num_experts_per_tok,
            "rope_parameters": carried_rope(dense),
        }
        if self.layout.shared_width:
            unit = shape.expert_width if self.layout.shared_counts_experts else 1
            sizes[self.layout.shared_width] = self.shared_width(shape) // unit
        return self.config(**carried | sizes | self.fields(dense, shape))


def head_dim(dense: Any) -> int:
    """Width of an attention head, which not every config states."""
    return getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads


def window(dense: Any) -> int | None:
    """The sliding window that the layers of a dense model attend in; None if they see everything."""
    if dense.model_type in {"qwen2", "qwen3"}:
        return dense.sliding_window if "sliding_attention" in dense.layer_types else None
    return dense.sliding_window if dense.model_type == "mistral" else None
