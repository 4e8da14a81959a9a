"""Recording tells what was routed; replaying a router's own choices changes nothing, others exactly what R3 says."""

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen3MoeConfig

from moestro.errors import InputError
from moestro.models.routers import experts, routers
from moestro.models.routing import record_routes, replay_routes

SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
}
CONFIGS = {
    "mixtral": lambda: MixtralConfig(**SMALL, intermediate_size=96, num_local_experts=5),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SMALL, moe_intermediate_size=96, num_experts=5, norm_topk_prob=True),
    "qwen3_moe_raw": lambda: Qwen3MoeConfig(**SMALL, moe_intermediate_size=96, num_experts=5, norm_topk_prob=False),
}
B, S, L, K, E = 3, 11, 2, 2, 5


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=dtype)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for router in routers(model):
            router.weight.normal_(std=0.3)
    return model.train()


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
@pytest.mark.parametrize("name", CONFIGS)
def test_replaying_own_choices_changes_no_bit(name: str, dtype: torch.dtype, checkpointing: bool) -> None:
    model, ids_BS = build(name, dtype), tokens()
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
    assert all(gradients[f"model.layers.{layer}.mlp.gate.weight"].abs().sum() > 0 for layer in range(L))


@pytest.mark.parametrize("name", CONFIGS)
def test_given_experts_are_chosen_with_gates_from_live_logits(name: str) -> None:
    model, ids_BS, routes_TLK = build(name), tokens(), other_routes()
    with replay_routes(model, routes_TLK), record_routes(model) as record:
        model(ids_BS)
    for layer in range(L):
        ids_TK = routes_TLK[:, layer]
        assert torch.equal(record.ids[layer], ids_TK)
        chosen_TK = record.logits[layer].gather(-1, ids_TK)
        expected_TK = (
            chosen_TK.softmax(-1)
            if name != "qwen3_moe_raw"
            else (chosen_TK - record.logits[layer].logsumexp(-1, keepdim=True)).exp()
        )
        torch.testing.assert_close(record.weights[layer], expected_TK, atol=1e-6, rtol=1e-5)


def test_replayed_gates_carry_the_gradient_of_the_renormalised_softmax() -> None:
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


def test_checkpointed_replay_has_the_gradients_of_plain_replay() -> None:
    model, ids_BS, routes_TLK = build("qwen3_moe"), tokens(), other_routes()
    with replay_routes(model, routes_TLK):
        loss, gradients = loss_and_gradients(model, ids_BS)
    model.gradient_checkpointing_enable()
    with replay_routes(model, routes_TLK), record_routes(model) as record:
        checkpointed_loss, checkpointed = loss_and_gradients(model, ids_BS)
    assert torch.equal(loss, checkpointed_loss)
    assert all(torch.equal(gradients[name], checkpointed[name]) for name in gradients)
    assert torch.equal(record.routes(), routes_TLK)


def test_plain_torch_checkpoint_around_the_whole_model_works_too() -> None:
    model, ids_BS, routes_TLK = build("mixtral"), tokens(), other_routes()
    with replay_routes(model, routes_TLK):
        _, gradients = loss_and_gradients(model, ids_BS)
        model.zero_grad()
        checkpoint(lambda ids: model(ids, labels=ids).loss, ids_BS, use_reentrant=False).backward()
    assert all(torch.equal(gradients[name], weight.grad) for name, weight in model.named_parameters())


def test_a_later_forward_replaces_the_record_and_hooks_go_away() -> None:
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


def test_bad_routes_are_refused() -> None:
    model, good = build("mixtral"), other_routes()
    twice, high, low = good.clone(), good.clone(), good.clone()
    twice[4, 1] = 3
    high[0, 0, 0] = E
    low[0, 0, 0] = -1
    for routes, message in (
        (twice, "twice"),
        (high, "there are 5"),
        (low, "-1"),
        (good[:, :1], "2 layers"),
        (good[..., :1], "chooses 2"),
        (good[0], "integers"),
        (good.float(), "integers"),
        (good[:0], "empty"),
    ):
        with pytest.raises(ValueError, match=message), replay_routes(model, routes):
            pass


def test_row_count_and_firing_are_checked() -> None:
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


def test_backward_outside_the_block_is_caught_under_checkpointing() -> None:
    model = build("mixtral")
    model.gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match="backward inside"), replay_routes(model, other_routes()):
        model(tokens(), labels=tokens())
    with replay_routes(model, other_routes()), torch.no_grad():
        model(tokens())


def test_models_without_known_routers_are_refused() -> None:
    fields = {name: value for name, value in SMALL.items() if name != "num_experts_per_tok"}
    dense = AutoModelForCausalLM.from_config(LlamaConfig(**fields, intermediate_size=96))
    with pytest.raises(InputError, match="no routers"), record_routes(dense):
        pass
