"""One update on a tiny Mixtral: replay in every mode, micro-batches, activation checkpointing, penalties."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from moestro.config import Cispo, Correction, Dapo, DrGrpo, Grpo, Gspo, KlPenalty, RlConfig, TaskConfig
from moestro.errors import TrainingError
from moestro.inference.engine import Completion
from moestro.models.routers import routers
from moestro.models.routing import record_routes
from moestro.rl.preflight import preflight, require_alignment, shift
from moestro.rl.rollouts import Rollouts, collate
from moestro.rl.routing import choose
from moestro.rl.update import Learner, accumulate, prepare, update
from moestro.training.optimizer import build_optimizer

ALGORITHMS = [Grpo(), DrGrpo(), Dapo(), Gspo(clip=0.2), Cispo()]


def config(**changes) -> RlConfig:
    settings = {"task": TaskConfig(name="chain_sum"), "max_tokens": 6, "micro_batch_size": 3, "steps": 2}
    return RlConfig(**settings | changes)


@pytest.fixture
def model():
    torch.manual_seed(0)
    shape = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=6,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return MixtralForCausalLM(shape).eval()


def sampled(model, *, noise: float = 0.0) -> Rollouts:
    """Random answers as an engine with the weights of `model` would have scored and routed them."""
    generator = torch.Generator().manual_seed(1)
    prompts = [[5, 6, 7, 8], [11, 12]]
    groups = []
    for prompt in prompts:
        group = []
        for length in (6, 3, 1):
            answer = torch.randint(1, 64, (length,), generator=generator).tolist()
            tokens = torch.tensor([prompt + answer])
            with torch.no_grad(), record_routes(model) as record:
                logits = model(input_ids=tokens[:, :-1]).logits[0]
            chosen = logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[len(prompt) - 1 :, 0]
            chosen = chosen + noise * torch.randn(len(chosen), generator=generator)
            group.append(Completion(answer, chosen.numpy(), record.routes().numpy().astype(np.uint8), "stop"))
        groups.append(group)
    return collate(prompts, groups, torch.tensor([[1.0, -0.5, -0.5], [0.3, 0.7, -1.0]]))


def learner(model, mode="r3", **changes) -> Learner:
    settings = config(**changes)
    optimizer, schedule = build_optimizer(model, settings.optimizer, 4)
    reference = copy.deepcopy(model) if settings.kl else None
    return Learner(model, optimizer, schedule, settings, mode, reference)


def gradients(learner: Learner, rollouts: Rollouts) -> dict[str, torch.Tensor]:
    learner.model.zero_grad()
    prepared, _ = prepare(learner, rollouts)
    accumulate(learner, prepared)
    found = {name: p.grad.clone() for name, p in learner.model.named_parameters() if p.grad is not None}
    learner.model.zero_grad()
    return found


def foreign(rollouts: Rollouts, experts: int = 6) -> Rollouts:
    return Rollouts(**{**vars(rollouts), "routes_BSLK": (rollouts.routes_BSLK + 1) % experts})


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda one: one.type)
def test_micro_batches_do_not_change_the_gradient(model, algorithm):
    rollouts = sampled(model, noise=0.3)
    fields = {"algorithm": algorithm, "correction": Correction(), "kl": KlPenalty(coefficient=0.5)}
    whole = gradients(learner(model, micro_batch_size=6, **fields), rollouts)
    parts = gradients(learner(model, micro_batch_size=2, **fields), rollouts)
    for name, gradient in whole.items():
        torch.testing.assert_close(gradient, parts[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("mode", ["r2", "r3"])
def test_replaying_own_routes_changes_nothing(model, mode):
    rollouts = sampled(model)
    off, replayed = (gradients(learner(model, one), rollouts) for one in ("off", mode))
    for name, gradient in off.items():
        torch.testing.assert_close(gradient, replayed[name], atol=0 if mode == "r2" else 1e-6, rtol=0)


def test_foreign_routes_are_used_and_their_router_learns(model):
    """Replayed routes that the router would not choose: its gradient is that of finite differences."""
    model.double().set_experts_implementation("eager")
    rollouts = foreign(sampled(model))
    made = learner(model, "r3")
    prepared, figures = prepare(made, rollouts)
    assert figures["r3/used_mismatch"] == 0
    assert figures["r3/router_mismatch"] > 0.5
    layers = [figures[f"r3/router_mismatch/layer_{layer}"] for layer in range(2)]
    assert sum(layers) / 2 == pytest.approx(figures["r3/router_mismatch"])
    gradient = gradients(made, rollouts)["model.layers.0.mlp.gate.weight"]
    weight = routers(model)[0].weight
    index = divmod(int(gradient.abs().argmax()), gradient.shape[1])

    def loss(change: float) -> float:
        with torch.no_grad():
            weight[index] += change
        value = accumulate(made, prepared).loss
        with torch.no_grad():
            weight[index] -= change
        return value

    step = 1e-3  # logits and ratios are float32
    assert (loss(step) - loss(-step)) / (2 * step) == pytest.approx(float(gradient[index]), rel=5e-3)


def test_r2_keeps_the_routes_of_before_the_batch(model):
    rollouts = foreign(sampled(model))
    prepared, figures = prepare(learner(model, "r2"), rollouts)
    own = sampled(model).routes_BSLK
    assert torch.equal(prepared.routes_BSLK[rollouts.real_BS], own[rollouts.real_BS])
    assert figures["r3/used_mismatch"] > 0.5
    with torch.no_grad():  # the router changes, what is replayed does not
        for router in routers(model):
            router.weight.neg_()
    accumulate(learner(model, "r2"), prepared)


@pytest.mark.parametrize("mode", ["off", "r2", "r3"])
def test_activation_checkpointing_changes_no_gradient(model, mode):
    rollouts = foreign(sampled(model))
    plain = gradients(learner(model, mode), rollouts)
    model.gradient_checkpointing_enable()
    again = gradients(learner(model, mode, activation_checkpointing=True), rollouts)
    for name, gradient in plain.items():
        torch.testing.assert_close(gradient, again[name], atol=1e-7, rtol=1e-6)


def test_activation_checkpointing_computes_again_without_dropout_or_jitter(model):
    """Neither was in the old log-probabilities."""
    rollouts, passes = sampled(model), []
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
        layer.mlp.jitter_noise = 0.5
    plain = gradients(learner(model), rollouts)
    model.gradient_checkpointing_enable()
    handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    again = gradients(learner(model, activation_checkpointing=True), rollouts)
    handle.remove()
    parts = 2  # micro-batches; each is seen by `prepare`, by the forward pass and by its repetition
    assert len(passes) == 3 * parts
    assert not any(module.training for module in model.modules())
    for name, gradient in plain.items():
        torch.testing.assert_close(gradient, again[name], atol=1e-7, rtol=1e-6)


def test_importance_weights_scale_the_gradient(model):
    rollouts = sampled(model)
    moved = Rollouts(**{**vars(rollouts), "engine_logprobs_BS": rollouts.engine_logprobs_BS - math.log(1.5)})
    plain = gradients(learner(model), rollouts)
    weighted = gradients(learner(model, correction=Correction(high=4.0)), moved)
    for name, gradient in plain.items():
        torch.testing.assert_close(weighted[name], 1.5 * gradient, atol=1e-6, rtol=1e-4)
    masked = gradients(learner(model, correction=Correction(type="mask", high=1.4)), moved)
    assert not any(gradient.any() for gradient in masked.values())


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_penalty_draws_back_to_the_reference(model, estimator):
    rollouts = Rollouts(**{**vars(sampled(model)), "advantages_B": torch.zeros(6)})
    made = learner(model, kl=KlPenalty(coefficient=1.0, estimator=estimator))
    assert made.reference is not None
    at_home = update(made, prepare(made, rollouts)[0], step=1)
    assert at_home["kl"] == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for parameter in made.reference.parameters():
            parameter.mul_(1.1)
    away = update(made, prepare(made, rollouts)[0], step=1)
    assert abs(away["kl"]) > 1e-3
    assert away["grad_norm"] > 0


def test_figures_of_an_update(model):
    made = learner(model, mini_steps=2, correction=Correction())
    prepared, compared = prepare(made, sampled(model, noise=0.1))
    found = compared | update(made, prepared, step=1)
    assert found["r3/bytes_per_token"] == 2 * 2
    assert found["r3/rows"] == int(prepared.real_BS.sum())
    assert 0 < found["sampling/importance_sampling_ratio/min"] < 1 < found["sampling/importance_sampling_ratio/max"]
    assert found["r3/k3_kl"] > 0
    assert found["clip_ratio/region_mean"] == found["clip_ratio/low_mean"] + found["clip_ratio/high_mean"]


@pytest.mark.parametrize(("experts", "size"), [(256, 1), (257, 2)])
def test_bytes_of_routing_follow_from_the_number_of_experts_and_not_from_those_met(model, experts, size):
    rollouts = sampled(model)
    model.config.num_local_experts = experts  # as many as the engine says to have; the first six are met
    _, figures = prepare(learner(model, "off"), rollouts)
    assert figures["r3/bytes_per_token"] == 2 * 2 * size


def test_a_loss_that_is_not_finite_names_the_step_and_changes_nothing(model):
    rollouts = Rollouts(**{**vars(sampled(model)), "advantages_B": torch.full((6,), math.inf)})
    before = [parameter.clone() for parameter in model.parameters()]
    made = learner(model)
    with pytest.raises(TrainingError, match="rl step 7"):
        update(made, prepare(made, rollouts)[0], step=7)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, -1])
def test_routing_one_row_off_is_seen_before_the_first_update(model, rows, dtype):
    good = preflight(model, sampled(model), temperature=1.0, micro_batch_size=64)
    require_alignment(good, rollout_dtype=dtype)
    assert good.k3_shifted > 100 * max(good.k3_replayed, 1e-12)
    bad = preflight(model, shift(sampled(model), rows), temperature=1.0, micro_batch_size=64)
    assert bad.k3_replayed > 1e-4
    with pytest.raises(TrainingError, match="not where it belongs"):
        require_alignment(bad, rollout_dtype=dtype)


def test_rounding_that_hides_a_shift_from_k3_does_not_hide_it_from_the_choices(model):
    """A quickstart of bfloat16 is as far from its engine as one row off is, or nearly."""
    good = preflight(model, sampled(model), temperature=1.0, micro_batch_size=64)
    rough = replace(good, k3_replayed=7e-5, k3_shifted=5e-4, router_mismatch=0.0003, mismatch_shifted=0.08)
    require_alignment(rough, rollout_dtype="bfloat16")
    with pytest.raises(TrainingError, match=r"8\.00% of its choices .* 0\.03% one row off"):
        require_alignment(replace(rough, router_mismatch=0.08, mismatch_shifted=0.0003), rollout_dtype="bfloat16")
    require_alignment(replace(rough, router_mismatch=0.0003, mismatch_shifted=0.0005), rollout_dtype="bfloat16")


def test_the_preflight_keeps_to_micro_batches(model):
    rollouts, seen = sampled(model), []
    whole = preflight(model, rollouts, temperature=1.0, micro_batch_size=len(rollouts))
    handle = model.register_forward_pre_hook(
        lambda _module, _args, given: seen.append(len(given["input_ids"])), with_kwargs=True
    )
    parts = preflight(model, rollouts, temperature=1.0, micro_batch_size=2)
    handle.remove()
    assert max(seen) == 2
    assert len(rollouts) > 2
    assert parts.figures() == pytest.approx(whole.figures(), rel=1e-2, abs=1e-9)


def test_a_model_whose_routing_changes_nothing_passes(model):
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if name in ("gate_up_proj", "down_proj"):
                    parameter.copy_(parameter[:1].expand_as(parameter))
    found = preflight(model, sampled(model), temperature=1.0, micro_batch_size=64)
    require_alignment(found, rollout_dtype="float32")


def test_an_engine_of_another_model_is_not_told_to_have_misplaced_its_rows(model):
    found = preflight(model, sampled(model, noise=0.3), temperature=1.0, micro_batch_size=64)
    with pytest.raises(TrainingError, match="compute different models"):
        require_alignment(found, rollout_dtype="float32")


@pytest.mark.parametrize(
    ("fields", "mode", "words"),
    [
        ({"moe": False}, "off", "dense"),
        ({}, "off", "route alike"),
        ({"router_mismatch": 0.01}, "r3", "1.00%"),
        ({"mini_steps": 2}, "r2", "2 optimiser steps"),
        ({"mini_steps": 8}, "r3", "8 optimiser steps"),
        ({"mini_steps": 2, "max_staleness": 1}, "r3", "4 optimiser steps"),
        ({"mini_steps": 8, "returned": False}, "r2", "does not return"),
        ({"router_mismatch": 0.01, "returned": False}, "off", "does not return"),
    ],
)
def test_auto_chooses_by_off_policyness_and_says_why(fields, mode, words):
    known = {"mini_steps": 1, "max_staleness": 0, "moe": True, "returned": True, "router_mismatch": 0.0}
    choice = choose(**known | fields)
    assert choice.mode == mode
    assert words in choice.reason
