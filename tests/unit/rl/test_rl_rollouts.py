"""Rollouts as a padded batch: alignment of tokens, log-probabilities and routing with the trainer's positions."""

import numpy as np
import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from moestro.inference.engine import Completion
from moestro.models.routing import record_routes
from moestro.rl.policy import Inspection, inspect, policy_logprobs, routed
from moestro.rl.rollouts import Rollouts, collate

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
ANSWERS = [[[20, 21, 22], [23]], [[24, 25, 26, 27], [28, 29]]]
ADVANTAGES = torch.tensor([[1.0, -1.0], [0.5, -0.5]])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return MixtralForCausalLM(config).eval()


def logprobs_and_routes(model, prompt, answer):
    """What an engine that is this very model would say of one sequence alone."""
    tokens = torch.tensor([prompt + answer])
    with torch.no_grad(), record_routes(model) as record:
        logits = model(input_ids=tokens[:, :-1]).logits[0]
    chosen = logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
    return chosen[len(prompt) - 1 :].numpy(), record.routes().numpy().astype(np.uint8)


def rollouts(model) -> Rollouts:
    groups = []
    for prompt, answers in zip(PROMPTS, ANSWERS, strict=True):
        scored = [logprobs_and_routes(model, prompt, answer) for answer in answers]
        groups.append([Completion(a, l, r, "stop") for a, (l, r) in zip(answers, scored, strict=True)])
    return collate(PROMPTS, groups, ADVANTAGES)


def test_targets_follow_inputs_and_only_completions_count(model):
    batch = rollouts(model)
    assert batch.tokens == 10
    assert batch.inputs_BS[1].tolist() == [5, 6, 7, 8, 9, 10, 0, 0]
    assert batch.targets_BS[1][batch.mask_BS[1]].tolist() == [23]
    assert batch.targets_BS[2][batch.mask_BS[2]].tolist() == [24, 25, 26, 27]
    assert batch.real_BS.sum(dim=1).tolist() == [8, 6, 6, 4]
    assert batch.routes_BSLK[1, 6:].tolist() == [[[0, 1], [0, 1]]] * 2
    assert batch.advantages_B.tolist() == [1.0, -1.0, 0.5, -0.5]


@pytest.mark.parametrize("replay", [True, False])
def test_a_padded_batch_gives_what_each_sequence_gives_alone(model, replay):
    batch = rollouts(model)
    inspection = Inspection()
    logprobs, used = inspect(model, batch, inspection, temperature=1.0, replay=replay)
    assert torch.equal(used[batch.real_BS], batch.routes_BSLK[batch.real_BS])
    torch.testing.assert_close(logprobs, batch.engine_logprobs_BS, atol=1e-5, rtol=0)
    assert inspection.tokens == 10
    assert inspection.routings == 24 * 2
    assert inspection.own_differs.total() == inspection.used_differs == 0


def test_the_gradient_does_not_depend_on_micro_batches(model):
    batch = rollouts(model)

    def gradient(size: int) -> torch.Tensor:
        model.zero_grad()
        for part in batch.micro_batches(size):
            with routed(model, part, replay=True):
                policy_logprobs(model, part, temperature=0.7).sum().backward()
        return model.lm_head.weight.grad.clone()

    torch.testing.assert_close(gradient(1), gradient(4), atol=1e-5, rtol=1e-4)
    model.zero_grad()


def test_replay_forces_foreign_routing_on_the_experts_and_its_absence_shows(model):
    batch = rollouts(model)
    foreign = (batch.routes_BSLK + 1) % 4
    batch = Rollouts(**{**vars(batch), "routes_BSLK": foreign})
    for replay, used in ((True, 0), (False, 48)):
        inspection = Inspection()
        inspect(model, batch, inspection, temperature=1.0, replay=replay)
        assert inspection.used_differs == used
        assert inspection.own_differs.total() > 0
        assert sum(inspection.layer_mismatches()) == pytest.approx(2 * inspection.router_mismatch)


def test_entropy_is_that_of_the_completion_tokens(model):
    batch = rollouts(model)
    inspection = Inspection()
    inspect(model, batch, inspection, temperature=2.0, replay=True)
    with torch.no_grad():
        probabilities = (model(input_ids=batch.inputs_BS).logits / 2.0).softmax(-1)
    entropy = -(probabilities * probabilities.log()).sum(-1)[batch.mask_BS].mean()
    assert inspection.mean_entropy == pytest.approx(float(entropy), rel=1e-5)


def test_mini_batches_take_every_sequence_once(model):
    batch = rollouts(model)
    parts = batch.mini_batches(3)
    assert [len(part) for part in parts] == [1, 1, 2]
    assert sum(part.tokens for part in parts) == batch.tokens
    assert parts[1].inputs_BS.shape == (1, 6)
