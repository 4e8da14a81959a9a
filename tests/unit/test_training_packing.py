"""Documents that do not see each other: a packed sequence is worth what its documents are worth alone."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moestro.artifacts import Job
from moestro.config import GlobalBatchLoss, TrainingConfig
from moestro.data.packed import Batch, Mixture, PackedTokens
from moestro.errors import InputError
from moestro.training.attention import NAME, training_attention
from moestro.training.held_out import HeldOutText
from moestro.training.loop import train
from moestro.training.objective import backward, document_positions, next_token_loss
from moestro.training.routing_losses import Context, routing_objective

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "sliding_window": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
DENSE = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "granite")
MOE = ("mixtral", "qwen2_moe", "qwen3_moe", "flex_olmo", "granitemoe", "glm4_moe")
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
GLM = {"first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
LENGTHS = (5, 1, 11, 2, 14)
"""Of the documents in a window of 33 tokens."""


def model_of(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    extra = {**EXPERTS, **(GLM if kind == "glm4_moe" else {})} if kind in MOE else {}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE, **extra))


def window(seed: int, lengths: Sequence[int] = LENGTHS) -> tuple[torch.Tensor, torch.Tensor]:
    """A window of documents of those lengths, [1, S'], and where they start."""
    tokens_BS = torch.randint(0, 96, (1, sum(lengths)), generator=torch.Generator().manual_seed(seed))
    starts_BS = torch.zeros_like(tokens_BS, dtype=torch.bool)
    starts_BS[0, np.cumsum([0, *lengths[:-1]])] = True
    return tokens_BS, starts_BS


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def documents_alone(model: PreTrainedModel, windows: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """The mean loss over all predicted tokens, each document run by itself; leaves its gradients."""
    parts = [
        part_BS
        for tokens_BS, starts_BS in windows
        for part_BS in tokens_BS.tensor_split(starts_BS[0].nonzero().flatten().tolist()[1:], dim=1)
        if part_BS.shape[1] > 1
    ]
    count = sum(part_BS.shape[1] - 1 for part_BS in parts)
    loss = sum(next_token_loss(model, part_BS)[0] * (part_BS.shape[1] - 1) for part_BS in parts) / count
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    return float(loss.detach())


@pytest.mark.parametrize("kind", DENSE + MOE)
def test_a_packed_window_equals_its_documents_alone(kind: str) -> None:
    model = model_of(kind)
    tokens_BS, starts_BS = window(1)
    loss, _ = next_token_loss(model, tokens_BS, starts_BS)
    loss.backward()
    packed = gradients(model)
    alone = documents_alone(model, [(tokens_BS, starts_BS)])
    assert float(loss.detach()) == pytest.approx(alone, abs=1e-5)
    for name, expected in gradients(model).items():
        torch.testing.assert_close(packed[name], expected, rtol=1e-4, atol=1e-5, msg=name)
    across, _ = next_token_loss(model, tokens_BS)
    assert abs(float(across.detach()) - alone) > 1e-4


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_micro_batches_count_by_their_predicted_tokens(kind: str) -> None:
    model = model_of(kind)
    windows = [window(1), window(2, (33,)), window(3, (1,) * 32 + (1,)), window(4, (16, 17))]
    tokens_BS, starts_BS = (torch.cat(parts) for parts in zip(*windows, strict=True))
    batch = Batch(tokens_BS, torch.zeros(4, dtype=torch.long), starts_BS)  # type: ignore[arg-type]
    loss = backward(model, batch, accumulation=4, dtype=torch.float32, auxiliary=None, cross_document_attention=False)
    packed = gradients(model)
    assert loss == pytest.approx(documents_alone(model, windows), abs=1e-5)
    for name, expected in gradients(model).items():
        torch.testing.assert_close(packed[name], expected, rtol=1e-4, atol=1e-5, msg=name)


def test_positions_restart_at_each_document() -> None:
    _, starts_BS = window(0)
    expected = [place for length in LENGTHS for place in range(length)]
    assert document_positions(starts_BS).tolist() == [expected]
    assert document_positions(torch.zeros(1, 4, dtype=torch.bool)).tolist() == [[0, 1, 2, 3]]


def test_short_attention_takes_documents_apart_too() -> None:
    model = model_of("llama")
    tokens_BS, starts_BS = window(1)
    positions_BS = document_positions(starts_BS)
    expected = model(input_ids=tokens_BS, position_ids=positions_BS, use_cache=False).logits
    expected.square().mean().backward()
    theirs = gradients(model)
    with training_attention(model, dtype=torch.bfloat16, positions=33):
        assert model.config._attn_implementation == NAME
        actual = model(input_ids=tokens_BS, position_ids=positions_BS, use_cache=False).logits
        actual.square().mean().backward()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    for name, mine in gradients(model).items():
        torch.testing.assert_close(mine, theirs[name], rtol=1e-4, atol=1e-7, msg=name)


def test_routing_losses_see_every_token_of_a_packed_window() -> None:
    model = model_of("mixtral")
    tokens_BS, starts_BS = window(1)
    batch = Batch(tokens_BS, torch.zeros(1, dtype=torch.long), starts_BS)  # type: ignore[arg-type]
    objective = routing_objective([GlobalBatchLoss()], Context(model, [["a"] * 4] * 2, ("a",)))
    with objective.attached():
        objective.begin(0, 1)
        backward(model, batch, accumulation=1, dtype=torch.float32, auxiliary=objective, cross_document_attention=False)
        assert [int(loads_E.sum()) for loads_E in objective.loads] == [2 * 32, 2 * 32]
        objective.end()


def test_windows_say_where_documents_start() -> None:
    documents = np.array([0, 7, 8, 30, 31, 64])
    packed = PackedTokens(np.arange(100), documents)
    for begin, length in ((0, 9), (7, 2), (9, 20), (20, 50), (64, 36)):
        expected = [place in documents for place in range(begin, begin + length)]
        assert packed.starts(begin, length).tolist() == expected
    batch = Mixture({"a": packed}, 8, seed=0).batch(0, 12)
    starts = {int(tokens[0]): row.tolist() for tokens, row in zip(batch.tokens_BS, batch.starts_BS, strict=True)}
    assert starts[0] == [True, *[False] * 6, True, True]
    assert starts[24] == [False] * 6 + [True, True, False]


def test_training_without_attention_across_documents_differs(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    packed = PackedTokens(generator.integers(0, 96, 600).astype(np.uint16), np.arange(0, 600, 7))
    losses = {}
    for across in (True, False):
        config = TrainingConfig(steps=2, batch_size=4, sequence_length=16, cross_document_attention=across)
        job = Job(out=tmp_path / f"{across}/out", scratch=tmp_path / f"{across}/scratch")
        for folder in (job.out, job.scratch):
            folder.mkdir(parents=True)
        mixture = Mixture({"a": packed}, 16, seed=0)
        losses[across] = train(model_of("llama"), mixture, config, job=job, trainable=lambda _: True).final_loss
    assert losses[True] != losses[False]


def test_a_batch_of_which_no_token_is_predicted_is_refused(tmp_path: Path) -> None:
    single = PackedTokens(np.arange(600) % 96, np.arange(600))
    for folder in (job := Job(out=tmp_path / "out", scratch=tmp_path / "scratch")).out, job.scratch:
        folder.mkdir()
    config = TrainingConfig(steps=2, batch_size=2, sequence_length=16, cross_document_attention=False)
    with pytest.raises(InputError, match=r"the batch of step 1 no token is predicted: .* It is digits \(windows"):
        train(model_of("llama"), Mixture({"digits": single}, 16, seed=0), config, job=job, trainable=lambda _: True)
    with pytest.raises(InputError, match="held-out text of domain 'digits' no token is predicted"):
        HeldOutText({"digits": single}, config, 256)
