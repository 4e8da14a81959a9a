"""Recording tells what was routed; replaying a router's own choices changes nothing, others exactly what R3 says."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig

from moestro.errors import InputError
from moestro.models.routers import experts, is_router_weight, routers
from moestro.models.routing import own_choices, record_routes, replay_routes

B, S, L, K, E = 3, 11, 2, 2, 6
DEEPSEEK = "deepseek_v3"
"""Not among the kinds of all tests: mixing does not make it."""


def deepseek(dtype: torch.dtype) -> Any:
    """A tiny DeepSeek-V3 with one dense layer before the L sparse ones, groups and a correction bias."""
    config = DeepseekV3Config(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=L + 1,
        first_k_dense_replace=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=E,
        n_shared_experts=1,
        num_experts_per_tok=K,
        n_group=3,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=1.5,
        initializer_range=0.2,
        pad_token_id=0,
    )
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for router in routers(model):
        router.e_score_correction_bias.normal_(std=0.2)
    return model


@pytest.fixture
def build(tiny_moe: Callable[..., Any]) -> Callable[..., Any]:
    def make(kind: str, dtype: torch.dtype = torch.float32) -> Any:
        model = deepseek(dtype) if kind == DEEPSEEK else tiny_moe(kind, dtype=dtype)
        model.set_experts_implementation("eager")
        with torch.no_grad():
            for router in routers(model):
                router.weight.normal_(std=0.3)
        return model.train()

    return make


def tokens() -> torch.Tensor:
    return torch.randint(320, (B, S), generator=torch.Generator().manual_seed(2))


def loss_and_gradients(model: Any, ids_BS: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(ids_BS, labels=ids_BS).loss
    loss.backward()
    return loss.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters()}


def other_routes(seed: int = 3) -> torch.Tensor:
    scores = torch.rand(B * S, L, E, generator=torch.Generator().manual_seed(seed))
    return scores.topk(K, dim=-1).indices


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replaying_own_choices_changes_no_bit(
    build: Callable[..., Any], moe_kind: str, dtype: torch.dtype, checkpointing: bool
) -> None:
    model, ids_BS = build(moe_kind, dtype), tokens()
    if checkpointing:
        model.gradient_checkpointing_enable()
    with record_routes(model) as record:
        loss, gradients = loss_and_gradients(model, ids_BS)
    routes_TLK = record.routes()
    assert routes_TLK.shape == (B * S, L, K)
    with replay_routes(model, routes_TLK):
        replayed_loss, replayed = loss_and_gradients(model, ids_BS)
    assert torch.equal(loss, replayed_loss)
    for weight, gradient in gradients.items():
        assert torch.equal(gradient, replayed[weight]), weight
    routing = [name for name, _ in model.named_parameters() if is_router_weight(name) and "shared" not in name]
    assert len(routing) == L
    assert all(gradients[name].abs().sum() > 0 for name in routing)


def test_replay_under_autocast_changes_no_bit(build: Callable[..., Any], moe_kind: str) -> None:
    model, ids_BS = build(moe_kind), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        with record_routes(model) as record, torch.no_grad():
            expected = model(ids_BS).logits
        with replay_routes(model, record.routes()), torch.no_grad():
            assert torch.equal(model(ids_BS).logits, expected)


def given_gates(kind: str, model: Any, logits_TE: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
    """What a router of that kind gives for chosen experts."""
    if kind.startswith(("glm4_moe", DEEPSEEK)):
        scores_TK = logits_TE.sigmoid().gather(-1, ids_TK)
        return model.config.routed_scaling_factor * scores_TK / scores_TK.sum(-1, keepdim=True)
    if kind == "olmoe":
        return logits_TE.softmax(-1).gather(-1, ids_TK)
    return logits_TE.gather(-1, ids_TK).softmax(-1)


def test_given_experts_are_chosen_with_gates_from_live_logits(build: Callable[..., Any], moe_kind: str) -> None:
    model, ids_BS, routes_TLK = build(moe_kind), tokens(), other_routes()
    received = []
    for module in experts(model):
        module.register_forward_pre_hook(lambda _, args: received.append(args[1:]))
    with replay_routes(model, routes_TLK), record_routes(model) as record:
        model(ids_BS)
    for layer in range(L):
        ids_TK = routes_TLK[:, layer]
        assert torch.equal(record.ids[layer], ids_TK)
        expected_TK = given_gates(moe_kind, model, record.logits[layer], ids_TK)
        torch.testing.assert_close(record.weights[layer], expected_TK, atol=1e-6, rtol=1e-5)
        assert torch.equal(received[layer][0], ids_TK)
        assert torch.equal(received[layer][1], record.weights[layer])


def test_own_choices_are_known_while_others_are_replayed(build: Callable[..., Any], moe_kind: str) -> None:
    """In the first layer, that is, which gets the same hidden states either way."""
    model, ids_BS = build(moe_kind), tokens()
    with torch.no_grad(), record_routes(model) as record:
        model(ids_BS)
    own_TK = record.ids[0].sort(-1).values
    with torch.no_grad(), replay_routes(model, other_routes()), record_routes(model) as record:
        model(ids_BS)
    assert torch.equal(own_choices(model, record)[0].sort(-1).values, own_TK)
    assert not torch.equal(record.ids[0].sort(-1).values, own_TK)


def test_replayed_gates_carry_the_gradient_of_the_renormalised_softmax(build: Callable[..., Any]) -> None:
    model, routes_TLK = build("mixtral"), other_routes()
    with replay_routes(model, routes_TLK), record_routes(model) as record:
        model(tokens())
    weights_TK, logits_TE = record.weights[1], record.logits[1]
    (gradient_TE,) = torch.autograd.grad(weights_TK[:, 0].sum(), logits_TE)
    first_T, second_T = weights_TK.detach().unbind(-1)
    expected_TE = torch.zeros_like(logits_TE).scatter(
        1, routes_TLK[:, 1], torch.stack([first_T * second_T, -first_T * second_T], dim=-1)
    )
    torch.testing.assert_close(gradient_TE, expected_TE, atol=1e-6, rtol=1e-4)


def test_checkpointed_replay_has_the_gradients_of_plain_replay(build: Callable[..., Any]) -> None:
    model, ids_BS, routes_TLK = build("qwen3_moe"), tokens(), other_routes()
    with replay_routes(model, routes_TLK):
        loss, gradients = loss_and_gradients(model, ids_BS)
    model.gradient_checkpointing_enable()
    with replay_routes(model, routes_TLK), record_routes(model) as record:
        checkpointed_loss, checkpointed = loss_and_gradients(model, ids_BS)
    assert torch.equal(loss, checkpointed_loss)
    assert all(torch.equal(gradients[name], checkpointed[name]) for name in gradients)
    assert torch.equal(record.routes(), routes_TLK)


def test_plain_torch_checkpoint_around_the_whole_model_works_too(build: Callable[..., Any]) -> None:
    model, ids_BS, routes_TLK = build("mixtral"), tokens(), other_routes()
    with replay_routes(model, routes_TLK):
        _, gradients = loss_and_gradients(model, ids_BS)
        model.zero_grad()
        checkpoint(lambda ids: model(ids, labels=ids).loss, ids_BS, use_reentrant=False).backward()
    assert all(torch.equal(gradients[name], weight.grad) for name, weight in model.named_parameters())


def test_a_later_forward_replaces_the_record_and_hooks_go_away(build: Callable[..., Any]) -> None:
    model = build("mixtral")
    with record_routes(model) as record, torch.no_grad():
        model(tokens())
        first = record.routes()
        model.model(tokens().flip(0))
    assert len(record.logits) == len(record.ids) == len(record.weights) == L
    assert not torch.equal(first, record.routes())
    kept = record.routes()
    with torch.no_grad():
        model(tokens())
    assert torch.equal(kept, record.routes())
    assert not model.model._forward_hooks
    assert not any(router._forward_hooks for router in routers(model))


def test_bad_routes_are_refused(build: Callable[..., Any]) -> None:
    model, good = build("mixtral"), other_routes()
    twice, high, low = good.clone(), good.clone(), good.clone()
    twice[4, 1] = 3
    high[0, 0, 0] = E
    low[0, 0, 0] = -1
    for routes, message in (
        (twice, "twice"),
        (high, "there are 6"),
        (low, "-1"),
        (good[:, :1], "2 layers"),
        (good[..., :1], "chooses 2"),
        (good[0], "integers"),
        (good.float(), "integers"),
        (good[:0], "empty"),
    ):
        with pytest.raises(ValueError, match=message), replay_routes(model, routes):
            pass


def test_row_count_and_firing_are_checked(build: Callable[..., Any]) -> None:
    model, good = build("mixtral"), other_routes()
    with pytest.raises(RuntimeError, match="33 tokens, the routes are for 32"), replay_routes(model, good[1:]):
        model(tokens())
    with pytest.raises(RuntimeError, match="no forward pass"), replay_routes(model, good):
        pass
    router_forward = routers(model)[0]
    original = experts(model)[0].forward

    def twice(x_TD: torch.Tensor, ids_TK: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor:
        router_forward(x_TD)
        return original(x_TD, ids_TK, gates_TK)

    experts(model)[0].forward = twice
    with pytest.raises(RuntimeError, match=r"\[2, 1\]"), replay_routes(model, good):
        model(tokens())
    with pytest.raises(RuntimeError, match=r"\[2, 1\]"), record_routes(model):
        model(tokens())


def test_backward_outside_the_block_is_caught_under_checkpointing(build: Callable[..., Any]) -> None:
    model = build("mixtral")
    model.gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match="backward inside"), replay_routes(model, other_routes()):
        model(tokens(), labels=tokens())
    with replay_routes(model, other_routes()), torch.no_grad():
        model(tokens())


def test_models_without_known_routers_are_refused(dense_fields: dict[str, Any]) -> None:
    dense = AutoModelForCausalLM.from_config(LlamaConfig(**dense_fields))
    with pytest.raises(InputError, match="no routers"), record_routes(dense):
        pass


@pytest.mark.parametrize(
    "holds",
    [
        partial(test_replaying_own_choices_changes_no_bit, dtype=torch.float32, checkpointing=True),
        partial(test_replaying_own_choices_changes_no_bit, dtype=torch.bfloat16, checkpointing=False),
        test_replay_under_autocast_changes_no_bit,
        test_given_experts_are_chosen_with_gates_from_live_logits,
        test_own_choices_are_known_while_others_are_replayed,
    ],
)
def test_deepseek_v3_is_replayed_as_the_others_are(build: Callable[..., Any], holds: Callable[..., None]) -> None:
    holds(build, moe_kind=DEEPSEEK)
