"""Schedule, parameter groups, the blockwise cross entropy and the short attention, against plain formulas."""

import math

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from moestro.config import OptimizerConfig
from moestro.data.packed import Batch
from moestro.training import cross_entropy
from moestro.training.attention import NAME, training_attention
from moestro.training.cross_entropy import head_cross_entropy
from moestro.training.history import History
from moestro.training.objective import backward, next_token_loss
from moestro.training.optimizer import build_optimizer, parameter_groups, schedule_factor

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def dense(**changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **{"tie_word_embeddings": True, **changes}))


def random_tokens(rows: int, positions: int) -> torch.Tensor:
    return torch.randint(0, 96, (rows, positions), generator=torch.Generator().manual_seed(3))


def as_batch(tokens_BS: torch.Tensor) -> Batch:
    domains_B = torch.zeros(len(tokens_BS), dtype=torch.long)
    return Batch(tokens_BS, domains_B, torch.zeros_like(tokens_BS, dtype=torch.bool))  # type: ignore[arg-type]


def test_schedule_values() -> None:
    config = OptimizerConfig(warmup_steps=4, min_learning_rate_ratio=0.1, schedule="cosine")
    factors = [schedule_factor(config, step, 24) for step in range(24)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[13] == pytest.approx(0.55)
    assert factors[-1] == pytest.approx(0.1)
    linear = config.model_copy(update={"schedule": "linear"})
    assert schedule_factor(linear, 8, 24) == pytest.approx(1 - 0.9 * 5 / 20)
    constant = config.model_copy(update={"schedule": "constant"})
    assert [schedule_factor(constant, step, 24) for step in (0, 3, 23)] == [0.25, 1.0, 1.0]


def test_the_optimizer_follows_the_schedule() -> None:
    config = OptimizerConfig(learning_rate=0.5, warmup_steps=2, schedule="constant")
    optimizer, schedule = build_optimizer(dense(), config, 4)
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == [0.25, 0.5, 0.5, 0.5]


def test_weight_decay_spares_embeddings_norms_and_routers() -> None:
    model = MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4, tie_word_embeddings=False))
    decayed, exempt = parameter_groups(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(parameter)].rsplit(".", 2)[-2] for parameter in exempt} == {
        "embed_tokens", "input_layernorm", "post_attention_layernorm", "norm", "gate",
    }  # fmt: skip
    assert "lm_head.weight" in {names[id(parameter)] for parameter in decayed}
    assert len(decayed) + len(exempt) == len(names)
    tied_decayed, _ = parameter_groups(dense())
    assert all(parameter.dim() == 2 and 96 not in parameter.shape for parameter in tied_decayed)


@pytest.mark.parametrize("frozen", ["none", "weight", "hidden"])
def test_head_cross_entropy_and_its_gradients(monkeypatch: pytest.MonkeyPatch, frozen: str) -> None:
    monkeypatch.setattr(cross_entropy, "BLOCK_LOGITS", 1)
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(30, 16, generator=generator, requires_grad=frozen != "hidden")
    weight_VD = torch.randn(50, 16, generator=generator, requires_grad=frozen != "weight")
    labels_T = torch.randint(0, 50, (30,), generator=generator)
    leaves = [leaf for leaf in (hidden_TD, weight_VD) if leaf.requires_grad]
    expected = functional.cross_entropy(hidden_TD @ weight_VD.T, labels_T)
    actual = head_cross_entropy(hidden_TD, weight_VD, labels_T)
    torch.testing.assert_close(actual, expected)
    for mine, theirs in zip(
        torch.autograd.grad(3 * actual, leaves), torch.autograd.grad(3 * expected, leaves), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_and_its_gradients_are_those_of_transformers(tied: bool) -> None:
    model = dense(tie_word_embeddings=tied)
    tokens_BS = random_tokens(3, 21)
    next_token_loss(model, tokens_BS)[0].backward()
    mine = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    logits = model(input_ids=tokens_BS[:, :-1]).logits
    functional.cross_entropy(logits.flatten(0, 1), tokens_BS[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(mine[name], parameter.grad, msg=name)


def test_short_attention_equals_sdpa() -> None:
    model = dense()
    tokens_BS = random_tokens(2, 24)
    expected = model(input_ids=tokens_BS).logits
    with training_attention(model, dtype=torch.bfloat16, positions=24):
        assert model.config._attn_implementation == NAME
        actual = model(input_ids=tokens_BS).logits
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert model.config._attn_implementation == "sdpa"


def test_short_attention_leaves_long_windows_float32_and_dropout_alone() -> None:
    model = dense()
    for dtype, positions in ((torch.float32, 24), (torch.bfloat16, 1024)):
        with training_attention(model, dtype=dtype, positions=positions):
            assert model.config._attn_implementation == "sdpa"
    model.config.attention_dropout = 0.1
    with training_attention(model, dtype=torch.bfloat16, positions=24):
        assert model.config._attn_implementation == "sdpa"


def test_bfloat16_is_close_to_float32_with_float32_gradients() -> None:
    model = dense()
    tokens_BS = random_tokens(4, 33)
    exact = backward(model, as_batch(tokens_BS), accumulation=1, dtype=torch.float32, auxiliary=None)
    model.zero_grad()
    with training_attention(model, dtype=torch.bfloat16, positions=32):
        rounded = backward(model, as_batch(tokens_BS), accumulation=1, dtype=torch.bfloat16, auxiliary=None)
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=5e-3)
    assert {parameter.grad.dtype for parameter in model.parameters() if parameter.grad is not None} == {torch.float32}


def test_accumulated_gradients_equal_those_of_the_large_batch() -> None:
    model = dense()
    tokens_BS = random_tokens(8, 17)
    whole = backward(model, as_batch(tokens_BS), accumulation=1, dtype=torch.float32, auxiliary=None)
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    parts = backward(model, as_batch(tokens_BS), accumulation=4, dtype=torch.float32, auxiliary=None)
    assert parts == pytest.approx(whole, rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-7, msg=name)


def test_history_means_and_flatness() -> None:
    history = History(losses=[4.0, 2.0])
    assert history.log(2, {"grad_norm": 1.0}) == {"loss": 3.0, "grad_norm": 1.0}
    history.losses += [1.0] * 6 + [0.5, 0.5]
    assert history.log(10, {})["loss"] == pytest.approx((6 + 1) / 8)
    assert history.flatness() == pytest.approx(0.5)
    assert math.isclose(History(losses=[1.0]).flatness(), 0.0)
