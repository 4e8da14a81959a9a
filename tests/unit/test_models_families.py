"""Which dense configs become which MoE configs, and what is refused by name."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moestro.errors import InputError
from moestro.models.families import FAMILIES, UNSUPPORTED, MoeShape, check_seed, family_of, feed_forward_part
from moestro.models.families.support import CANNOT, support
from moestro.models.layouts import LAYOUTS
from moestro.models.routers import experts, feed_forwards, is_router_weight, parameter_counts, routers

Make = Callable[..., Any]
KINDS = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "granite")
ROPE = ("rope_type", "partial_rotary_factor")
WINDOW = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}
SHARED = {"shared_width": 96}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 2.0}


@pytest.fixture
def make(dense_fields: dict[str, Any]) -> Make:
    """Makes a config, by its model's type, that differs from the tiny one in some fields."""
    return lambda kind, **fields: AutoConfig.for_model(kind, **dense_fields | fields)


def plain(make: Make, kind: str, **fields: Any) -> Any:
    """A config with nothing that any family could not carry."""
    return make(kind, **fields, **({"sliding_window": None} if kind == "mistral" else {}))


def shape(**fields: Any) -> MoeShape:
    return MoeShape(**{"num_experts": 3, "num_experts_per_tok": 2, "expert_width": 96} | fields)


def converted(config: Any, target: str = "auto", **fields: Any) -> Any:
    return family_of(config, shape(**fields), target).moe_config(config, shape(**fields))


def test_what_both_have_in_common_is_carried_over(make: Make, dense_fields: dict[str, Any]) -> None:
    rope = {"rope_type": "linear", "rope_theta": 123.0, "factor": 2.0}
    dense = make(
        "mistral",
        head_dim=24,
        sliding_window=7,
        rope_parameters=rope,
        tie_word_embeddings=True,
        rms_norm_eps=1e-3,
        eos_token_id=[5, 6],
        pad_token_id=7,
        bos_token_id=None,
        max_position_embeddings=99,
    )
    moe = converted(dense)
    assert moe.model_type == "mixtral"
    assert (moe.num_local_experts, moe.num_experts_per_tok) == (3, 2)
    for field in (*dense_fields, "head_dim", "sliding_window", "tie_word_embeddings", "rms_norm_eps", "eos_token_id"):
        assert getattr(moe, field) == getattr(dense, field), field
    assert (moe.pad_token_id, moe.bos_token_id, moe.max_position_embeddings) == (7, None, 99)
    assert moe.rope_parameters["factor"] == 2.0
    assert moe.rope_parameters["rope_theta"] == 123.0


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_tokens_are_the_seeds_and_never_the_defaults(kind: str, make: Make) -> None:
    ids = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": 3}
    for family in FAMILIES[kind]:
        moe = family.moe_config(plain(make, kind, **ids), shape())
        assert {name: getattr(moe, name) for name in ids} == ids


def test_only_a_window_that_is_heeded_is_carried(make: Make) -> None:
    assert converted(make("llama", sliding_window=7)).sliding_window is None
    assert converted(make("mistral", sliding_window=7)).sliding_window == 7
    for kind in ("qwen2", "qwen3"):
        assert not converted(make(kind, sliding_window=7)).sliding_window
        assert converted(make(kind, **WINDOW)).sliding_window == 7
    assert converted(make("qwen2", **WINDOW)).layer_types == ["sliding_attention"] * 2


def test_gates_are_renormalised_and_all_layers_are_sparse(make: Make) -> None:
    moe = converted(make("qwen3", head_dim=24))
    assert (moe.model_type, moe.norm_topk_prob) == ("qwen3_moe", True)
    assert (moe.num_experts, moe.moe_intermediate_size, moe.head_dim) == (3, 96, 24)
    assert (moe.mlp_only_layers, moe.decoder_sparse_step, moe.sliding_window) == ([], 1, None)
    moe = converted(make("qwen2"), shared_width=80)
    assert (moe.model_type, moe.norm_topk_prob, moe.qkv_bias) == ("qwen2_moe", True, True)
    assert (moe.shared_expert_intermediate_size, moe.mlp_only_layers, moe.decoder_sparse_step) == (80, [], 1)
    assert converted(make("qwen2")).shared_expert_intermediate_size == 0
    moe = converted(make("olmo2", attention_bias=True))
    assert (moe.model_type, moe.norm_topk_prob, moe.attention_bias) == ("flex_olmo", True, True)


def test_granites_multipliers_are_carried(make: Make) -> None:
    multipliers = {
        "embedding_multiplier": 12.0,
        "logits_scaling": 8.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.0078,
    }
    moe = converted(make("granite", **multipliers))
    assert {name: getattr(moe, name) for name in multipliers} == multipliers


def test_glm_rotates_whole_heads_and_unties_the_head(make: Make) -> None:
    dense = make("qwen3", head_dim=24, tie_word_embeddings=True)
    before = copy.deepcopy(dense.to_dict())
    fields = {**SHARED, "num_experts": 4, "loss_free": True, "num_groups": 2}
    moe = converted(dense, **fields)
    assert moe.model_type == "glm4_moe"
    assert dense.to_dict() == before
    assert moe.rope_parameters["partial_rotary_factor"] == moe.partial_rotary_factor == 1.0
    assert (moe.tie_word_embeddings, moe.head_dim, moe.use_qk_norm, moe.attention_bias) == (False, 24, True, False)
    assert (moe.first_k_dense_replace, moe.routed_scaling_factor, moe.norm_topk_prob) == (0, 1.0, True)
    assert (moe.n_routed_experts, moe.n_shared_experts, moe.n_group, moe.topk_group) == (4, 1, 2, 1)
    added = family_of(dense, shape(**fields)).added(dense)["lm_head.weight"]
    assert (added.shape, added.copy_of) == ((320, 64), "model.embed_tokens.weight")
    assert converted(make("qwen2"), loss_free=True).attention_bias is True
    untied = make("llama")
    family = family_of(untied, shape(**SHARED))
    assert family.added(untied) == {}
    assert [family.shared_width(shape(shared_width=width)) for width in (0, 1, 96, 97)] == [96, 96, 96, 192]


def test_seeds_without_biases_get_zeros_where_vllm_wants_some(make: Make) -> None:
    dense = make("llama")
    added = family_of(dense, shape(), "qwen2_moe").added(dense)
    assert {name.split(".", 3)[3]: item.shape for name, item in added.items()} == {
        "self_attn.q_proj.bias": (64,),
        "self_attn.k_proj.bias": (32,),
        "self_attn.v_proj.bias": (32,),
    }
    assert len(added) == 6
    assert not any(item.copy_of for item in added.values())
    assert family_of(make("qwen2"), shape()).added(make("qwen2")) == {}


@pytest.mark.parametrize(
    ("dense", "fields", "expected"),
    [
        (("llama", {}), {}, "mixtral"),
        (("llama", {}), SHARED, "glm4_moe"),
        (("mistral", {"sliding_window": 7}), SHARED, "qwen2_moe"),
        (("mistral", {"sliding_window": None}), {"loss_free": True}, "glm4_moe"),
        (("qwen2", {}), SHARED, "qwen2_moe"),
        (("qwen2", {"head_dim": 24}), {}, "glm4_moe"),
        (("qwen2", {}), {"loss_free": True}, "glm4_moe"),
        (("qwen3", {}), SHARED, "glm4_moe"),
    ],
)
def test_the_first_that_carries_everything_is_taken(
    dense: tuple[str, dict[str, Any]], fields: dict[str, Any], expected: str, make: Make
) -> None:
    kind, own = dense
    assert converted(make(kind, **own), **fields).model_type == expected


TRIPPED = {
    "activations other than silu": {"hidden_act": "gelu"},
    "biases in the feed-forward networks": {"mlp_bias": True},
    "dynamic rope scaling": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    "rope types other than default, linear, llama3, yarn": {
        "rope_parameters": {**LONG, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    },
    "partial rotary embeddings": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    },
    "a bias of the attention's output": {"attention_bias": True},
    "biases in the attention": {"attention_bias": True},
    "a head_dim other than hidden_size / num_attention_heads": {"head_dim": 24},
    "sliding windows": WINDOW,
    "layers with and without a window in one model": {**WINDOW, "max_window_layers": 1},
}
"""For everything that some family cannot carry, a config that has it."""


@pytest.mark.parametrize(("kind", "number"), [(kind, n) for kind, known in FAMILIES.items() for n in range(len(known))])
def test_everything_that_cannot_be_carried_is_found_and_named(kind: str, number: int, make: Make) -> None:
    family = FAMILIES[kind][number]
    assert family.refuse(plain(make, kind)) == []
    for limit in family.limits:
        fields = TRIPPED[limit.what]
        dense = make(kind, **fields)
        found = limit.found(dense)
        assert found, limit.what
        with pytest.raises(InputError) as raised:
            family.moe_config(dense, shape())
        assert limit.way_out in raised.value.hint
        assert found in raised.value.message
        assert re.search("|".join(f"{name} = " for name in (*fields, *LONG, *ROPE, "layer_types")), found)


@pytest.mark.parametrize(
    ("dense", "target", "fields", "named"),
    [
        (("llama", {"attention_bias": True, "mlp_bias": True}), "auto", {}, ["attention_bias", "mlp_bias", "glm4"]),
        (("qwen3", {"use_sliding_window": True, "max_window_layers": 1}), "auto", {}, ["layer_types"]),
        (("llama", {}), "mixtral", SHARED, ["no shared expert", "mix.target to glm4_moe"]),
        (("qwen2", {}), "qwen2_moe", {"loss_free": True}, ["no loss-free", "mix.target to glm4_moe"]),
        (("olmo2", {}), "auto", SHARED, ["no shared expert", "mix.generalist to expert"]),
        (("olmo2", {}), "auto", {"loss_free": True}, ["mix.selection to softmax"]),
        (("qwen2", {}), "mixtral", {}, ["cannot become a mixtral", "qwen2_moe, glm4_moe"]),
        (("qwen2", {"head_dim": 24}), "qwen2_moe", {}, ["head_dim = 24", "mix.target to glm4_moe"]),
        (("gpt2", {}), "auto", {}, ["'gpt2'", "learnt positions", "llama, mistral, qwen2, qwen3, olmo2, granite"]),
        (("gemma2", {}), "auto", {}, ["'gemma2'", "1 + w"]),
        (("phi3", {}), "auto", {}, ["'phi3'", "split"]),
        (("mixtral", {}), "auto", {}, ["'mixtral'", "already"]),
        (("deepseek_v3", {}), "auto", {}, ["'deepseek_v3'", "no way is known"]),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_refusals_name_the_field_and_the_way_out(
    dense: tuple[str, dict[str, Any]], target: str, fields: dict[str, Any], named: list[str], make: Make
) -> None:
    kind, own = dense
    with pytest.raises(InputError) as raised:
        converted(make(kind, **own), target, **fields)
    for text in named:
        assert text in str(raised.value)


def test_a_seed_is_checked_before_anything_is_made_of_it(make: Make) -> None:
    for kind in KINDS:
        check_seed(make(kind))
    for config in (make("gpt2"), make("llama", mlp_bias=True)):
        with pytest.raises(InputError):
            check_seed(config)


def test_architectures_that_are_refused_exist() -> None:
    assert UNSUPPORTED.keys() <= MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()
    assert not UNSUPPORTED.keys() & (FAMILIES.keys() | LAYOUTS.keys())


def test_options_that_vllm_stumbles_over_are_carried_in_a_form_it_takes(make: Make) -> None:
    linear = converted(make("llama", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4}))
    assert isinstance(linear.rope_parameters["factor"], float)
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    moe = converted(make("llama", rope_parameters={**yarn, "beta_fast": None}))
    assert moe.rope_parameters == yarn


def test_the_table_of_what_is_supported_is_the_registry() -> None:
    rows = list(support())
    assert [(row.dense, row.moe) for row in rows] == [(f.dense, f.moe) for known in FAMILIES.values() for f in known]
    by_pair = {(row.dense, row.moe): row for row in rows}
    assert by_pair["olmo2", "flex_olmo"].engine == "vLLM, through transformers"
    assert by_pair["qwen2", "qwen2_moe"].shared_expert == "gated"
    assert by_pair["qwen3", "glm4_moe"].shared_expert == "added"
    assert [row.loss_free for row in rows] == [row.moe == "glm4_moe" for row in rows]
    assert "sliding windows" in by_pair["mistral", "glm4_moe"].cannot
    assert "activations other than silu" in CANNOT
    assert all(not set(row.cannot) & set(CANNOT) for row in rows)


def test_parts_are_found_by_name_and_structure(make: Make) -> None:
    dense = AutoModelForCausalLM.from_config(make("llama"))
    assert (len(feed_forwards(dense)), routers(dense), experts(dense)) == (2, [], [])
    parts = [part for name, _ in dense.named_parameters() if (part := feed_forward_part(name))]
    assert sorted(parts) == [(layer, name) for layer in (0, 1) for name in ("down_proj", "gate_proj", "up_proj")]
    assert not any(is_router_weight(name) for name, _ in dense.named_parameters())
    moe = AutoModelForCausalLM.from_config(converted(make("llama")))
    assert (feed_forwards(moe), len(routers(moe)), len(experts(moe))) == ([], 2, 2)
    found = {name: weight for name, weight in moe.named_parameters() if is_router_weight(name)}
    assert [weight.shape for weight in found.values()] == [torch.Size([3, 64])] * 2
    assert all(weight is router.weight for weight, router in zip(found.values(), routers(moe), strict=True))


def test_active_parameters_leave_out_the_experts_not_chosen(make: Make) -> None:
    dense = AutoModelForCausalLM.from_config(make("llama", tie_word_embeddings=True))
    counts = parameter_counts(dense)
    assert counts["parameters"] == counts["active_parameters"]
    moe = parameter_counts(AutoModelForCausalLM.from_config(converted(dense.config)))
    expert, routing = 3 * 64 * 96, 3 * 64
    assert moe["parameters"] == counts["parameters"] + 2 * (2 * expert + routing)
    assert moe["active_parameters"] == counts["parameters"] + 2 * (expert + routing)
