"""Which dense configs become which MoE configs, and what is refused by name."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen3Config

from moestro.errors import InputError
from moestro.models.families import family_of, feed_forward_part
from moestro.models.routers import experts, feed_forwards, is_router_weight, parameter_counts, routers

SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def converted(dense: Any) -> Any:
    return family_of(dense).moe_config(dense, num_experts=3, num_experts_per_tok=2)


def test_what_both_have_in_common_is_carried_over() -> None:
    rope = {"rope_type": "linear", "rope_theta": 123.0, "factor": 2.0}
    dense = MistralConfig(
        **SMALL,
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
    for field in (*SMALL, "head_dim", "sliding_window", "tie_word_embeddings", "rms_norm_eps", "eos_token_id"):
        assert getattr(moe, field) == getattr(dense, field), field
    assert (moe.pad_token_id, moe.bos_token_id, moe.max_position_embeddings) == (7, None, 99)
    assert moe.rope_parameters["factor"] == 2.0
    assert moe.rope_parameters["rope_theta"] == 123.0


def test_llama_has_no_sliding_window_and_qwen3_normalises_its_gates() -> None:
    assert converted(LlamaConfig(**SMALL)).sliding_window is None
    moe = converted(Qwen3Config(**SMALL, head_dim=24))
    assert moe.model_type == "qwen3_moe"
    assert moe.norm_topk_prob is True
    assert (moe.num_experts, moe.moe_intermediate_size, moe.head_dim) == (3, 96, 24)
    assert (moe.mlp_only_layers, moe.decoder_sparse_step, moe.sliding_window) == ([], 1, None)


@pytest.mark.parametrize(
    ("dense", "named"),
    [
        (lambda: LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True), ["attention_bias", "mlp_bias"]),
        (lambda: LlamaConfig(**SMALL, hidden_act="gelu"), ["hidden_act = 'gelu'"]),
        (lambda: Qwen3Config(**SMALL, attention_bias=True), ["attention_bias"]),
        (lambda: Qwen3Config(**SMALL, use_sliding_window=True, max_window_layers=1), ["layer_types"]),
        (GPT2Config, ["'gpt2'", "llama, mistral, qwen3"]),
    ],
)
def test_what_the_moe_cannot_express_is_named(dense: Any, named: list[str]) -> None:
    with pytest.raises(InputError) as raised:
        converted(dense())
    for text in named:
        assert text in str(raised.value)


def test_parts_are_found_by_name_and_structure() -> None:
    dense = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
    assert (len(feed_forwards(dense)), routers(dense), experts(dense)) == (2, [], [])
    parts = [part for name, _ in dense.named_parameters() if (part := feed_forward_part(name))]
    assert sorted(parts) == [(layer, name) for layer in (0, 1) for name in ("down_proj", "gate_proj", "up_proj")]
    assert not any(is_router_weight(name) for name, _ in dense.named_parameters())
    moe = AutoModelForCausalLM.from_config(converted(LlamaConfig(**SMALL)))
    assert (feed_forwards(moe), len(routers(moe)), len(experts(moe))) == ([], 2, 2)
    found = {name: weight for name, weight in moe.named_parameters() if is_router_weight(name)}
    assert [weight.shape for weight in found.values()] == [torch.Size([3, 64])] * 2
    assert all(weight is router.weight for weight, router in zip(found.values(), routers(moe), strict=True))


def test_active_parameters_leave_out_the_experts_not_chosen() -> None:
    dense = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, tie_word_embeddings=True))
    counts = parameter_counts(dense)
    assert counts["parameters"] == counts["active_parameters"]
    moe = parameter_counts(AutoModelForCausalLM.from_config(converted(dense.config)))
    expert, routing = 3 * 64 * 96, 3 * 64
    assert moe["parameters"] == counts["parameters"] + 2 * (2 * expert + routing)
    assert moe["active_parameters"] == counts["parameters"] + 2 * (expert + routing)
