"""Balance by rules on the correction bias: the sign update and the assignment's dual. T tokens, E experts, K chosen."""

from collections.abc import Callable
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Glm4MoeConfig, PreTrainedModel
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter

from moestro.artifacts import Artifact, Job
from moestro.config import BipBalance, LossFreeBalance, OptimizerConfig, TrainingConfig, TuneConfig
from moestro.data.packed import Mixture, PackedTokens
from moestro.data.tokenizer import train_bpe
from moestro.errors import ConfigError
from moestro.models.checkpoint import load_model, save_model
from moestro.models.routers import routers
from moestro.models.routing import record_routes
from moestro.training.auxiliary import MicroBatch
from moestro.training.routing_losses import Context, RoutingObjective, routing_objective
from moestro.training.routing_losses.balance import expert_counts, max_violation
from moestro.training.routing_losses.bip import balancing_prices
from moestro.training.routing_losses.loss_free import bias_step
from moestro.tuning import tune

pytestmark = pytest.mark.usefixtures("one_thread")

ORIGINS = [["code", "math", "seed", "code", "math", "seed"]] * 2


def routers_of(model: PreTrainedModel) -> list[Any]:
    return list(routers(model))


def skewed(model: PreTrainedModel) -> PreTrainedModel:
    """All tokens share a direction that two experts like; biases are zero."""
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] += 1.0
        for router in routers_of(model):
            router.weight[:2, 0] += 0.5
            router.e_score_correction_bias.zero_()
    return model


def tokens_of(rows: int, positions: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 300, (rows, positions), generator=torch.Generator().manual_seed(seed))


def micro(tokens_BS: torch.Tensor) -> MicroBatch:
    return MicroBatch(tokens_BS, torch.zeros(len(tokens_BS)), torch.zeros(1, 1, 1), torch.zeros(len(tokens_BS)))


def objective_on(model: PreTrainedModel, *configs: Any) -> RoutingObjective:
    return routing_objective(configs, Context(model, ORIGINS, ("code", "math")))


def loads_of(scores_TE: torch.Tensor, top_k: int) -> torch.Tensor:
    return expert_counts(scores_TE.topk(top_k, dim=1).indices, scores_TE.shape[1])


# Loss-free


def test_the_bias_moves_by_the_sign_of_the_deficit() -> None:
    loads_E = torch.tensor([10.0, 2.0, 6.0, 6.0], dtype=torch.float64)
    assert bias_step(loads_E, 0.25).tolist() == [-0.25, 0.25, 0.0, 0.0]


def test_loss_free_moves_the_routers_own_bias_once_per_step_by_the_whole_steps_loads(
    tiny_moe: Callable[..., PreTrainedModel],
) -> None:
    model = skewed(tiny_moe("glm4_moe")).train()
    objective = objective_on(model, LossFreeBalance(update_rate=0.125))
    with objective.attached():
        objective.begin(0, 1)
        counts = torch.zeros(2, 6, dtype=torch.float64)
        for seed in range(3):
            tokens_BS = tokens_of(2, 17, seed)
            model.base_model(input_ids=tokens_BS[:, :-1])
            loss = objective.loss(micro(tokens_BS))
            counts += torch.stack([expert_counts(ids_TK, 6) for ids_TK in objective.record.ids])
            assert not any(router.e_score_correction_bias.any() for router in routers_of(model))
        objective.end()
    assert float(loss) == 0.0
    assert not loss.requires_grad
    for router, counts_E in zip(routers_of(model), counts, strict=True):
        assert torch.equal(router.e_score_correction_bias, 0.125 * (32.0 - counts_E).sign().float())
    assert objective.metrics()["correction_bias_spread"] == 0.25


def test_loss_free_is_in_balance_within_200_steps() -> None:
    """On the router that is trained and served, where the best-liked expert first gets twice its share and more."""
    experts, top_k, hidden = 16, 4, 32
    config = Glm4MoeConfig(num_experts_per_tok=top_k, n_routed_experts=experts, hidden_size=hidden, n_group=1)
    router = Glm4MoeTopkRouter(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        router.weight.normal_(std=0.1, generator=generator)
        router.weight[:, 0] = torch.linspace(-0.15, 0.15, experts)
    violations = []
    for _ in range(200):
        hidden_TD = torch.randn(4096, hidden, generator=generator)
        hidden_TD[:, 0] = 1.0
        loads_E = expert_counts(router(hidden_TD)[2], experts)
        violations.append(max_violation(loads_E))
        router.e_score_correction_bias += bias_step(loads_E, 1e-3).float()
    assert violations[0] > 0.4
    assert violations[-1] <= 0.1


# BIP


@pytest.mark.parametrize("scores", ["uniform", "softmax", "sigmoid", "sigmoid, bfloat16"])
def test_bip_balances_random_scores_at_little_cost(scores: str) -> None:
    """The paper's setting: 64 experts, 8 chosen, nothing carried over."""
    logits_TE = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    scores_TE = {
        "uniform": torch.rand(4096, 64, generator=torch.Generator().manual_seed(0)),
        "softmax": logits_TE.softmax(dim=1),
        "sigmoid": logits_TE.sigmoid(),
        "sigmoid, bfloat16": logits_TE.bfloat16().sigmoid().float(),
    }[scores]
    assert max_violation(loads_of(scores_TE, 8)) > 0.07
    for iterations in (2, 4, 8):
        prices_E = balancing_prices(scores_TE, 8, iterations, torch.zeros(64))
        assert max_violation(loads_of(scores_TE - prices_E, 8)) <= 0.05
    ids_TK = (scores_TE - prices_E).topk(8, dim=1).indices
    kept = scores_TE.gather(1, ids_TK).sum() / scores_TE.topk(8, dim=1).values.sum()
    assert kept >= 0.98


@pytest.mark.parametrize("skew", [1.0, 3.0])
def test_bip_balances_skewed_scores_from_the_first_batch(skew: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scores_TE = (torch.randn(4096, 64, generator=generator) + skew * torch.randn(64, generator=generator)).sigmoid()
    assert max_violation(loads_of(scores_TE, 8)) > 6
    prices_E = balancing_prices(scores_TE, 8, 8, torch.zeros(64))
    assert max_violation(loads_of(scores_TE - prices_E, 8)) <= 0.05


def test_bip_finds_the_best_balanced_assignment() -> None:
    """Against all 90 ways to deal 6 tokens to 3 experts, 2 each."""
    for seed in range(5):
        scores_TE = torch.rand(6, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        scores_TE[:, 0] += 0.3
        balanced = [ways for ways in product(range(3), repeat=6) if all(ways.count(expert) == 2 for expert in range(3))]
        best = max(float(scores_TE[range(6), list(ways)].sum()) for ways in balanced)
        prices_E = balancing_prices(scores_TE, 1, 200, torch.zeros(3, dtype=torch.float64))
        chosen = (scores_TE - prices_E).argmax(dim=1)
        assert torch.bincount(chosen, minlength=3).tolist() == [2, 2, 2]
        assert float(scores_TE[range(6), chosen].sum()) == pytest.approx(best)


def test_one_iteration_by_hand() -> None:
    """Middles over experts are 0.5, 0.55, 0.55 and 0.475; less these, middles over tokens are as expected."""
    scores_TE = torch.tensor([[0.9, 0.1], [0.8, 0.3], [0.6, 0.5], [0.75, 0.2]])
    prices_E = balancing_prices(scores_TE, 1, 1, torch.zeros(2))
    torch.testing.assert_close(prices_E, torch.tensor([0.2625, -0.2625]))
    assert (scores_TE - prices_E).argmax(dim=1).tolist() == [0, 1, 1, 0]


def test_bip_with_a_share_that_is_no_whole_number() -> None:
    scores_TE = (torch.randn(64, 6, generator=torch.Generator().manual_seed(1)) + torch.arange(6) / 4).sigmoid()
    prices_E = balancing_prices(scores_TE, 2, 50, torch.zeros(6))
    loads_E = loads_of(scores_TE - prices_E, 2)  # 128 / 6 = 21.3
    assert sorted(loads_E.tolist()) == [21, 21, 21, 21, 22, 22]


def test_carried_prices_are_worth_iterations() -> None:
    generator = torch.Generator().manual_seed(2)
    favour_E = 3 * torch.randn(16, generator=generator)
    carried_E = torch.zeros(16)
    for _ in range(8):
        scores_TE = (torch.randn(2048, 16, generator=generator) + favour_E).sigmoid()
        anew_E, carried_E = (balancing_prices(scores_TE, 2, 1, start_E) for start_E in (torch.zeros(16), carried_E))
    violations = [max_violation(loads_of(scores_TE - prices_E, 2)) for prices_E in (anew_E, carried_E)]
    assert violations[0] > 0.5
    assert violations[1] < 0.15


def test_bip_routes_every_micro_batch_in_balance_from_the_first_step(tiny_moe: Callable[..., PreTrainedModel]) -> None:
    model = skewed(tiny_moe("glm4_moe", num_experts=4)).train()
    first_BS = tokens_of(8, 17, seed=0)
    with record_routes(model) as record:
        model.base_model(input_ids=first_BS[:, :-1])
        assert max(max_violation(expert_counts(ids_TK, 4)) for ids_TK in record.ids) > 0.5
    objective = objective_on(model, BipBalance())
    with objective.attached():
        objective.begin(0, 1)
        for seed in range(3):
            tokens_BS = tokens_of(8, 17, seed)
            model.base_model(input_ids=tokens_BS[:, :-1])
            objective.loss(micro(tokens_BS))
            for ids_TK in objective.record.ids:
                assert max_violation(expert_counts(ids_TK, 4)) <= 0.05
        objective.end()
    assert objective.metrics()["max_violation"] <= 0.05
    assert 0 < objective.metrics()["balance_score_loss"] < 0.3


def test_what_bip_trains_is_what_is_served(tiny_moe: Callable[..., PreTrainedModel]) -> None:
    """The choice, the gates and every gradient are those of the router itself with the bias that it leaves."""
    model = skewed(tiny_moe("glm4_moe"))
    tokens_BS = tokens_of(4, 16)
    objective = objective_on(model.train(), BipBalance())
    with objective.attached():
        rerouted = model(input_ids=tokens_BS, labels=tokens_BS).loss
        rerouted.backward()
        ids = [ids_TK.sort(dim=1).values for ids_TK in objective.record.ids]
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    for router in routers_of(model):
        assert router.e_score_correction_bias.abs().max() > 0.01
    with record_routes(model) as record:
        served = model(input_ids=tokens_BS, labels=tokens_BS).loss
    served.backward()
    assert all(torch.equal(one, other.sort(dim=1).values) for one, other in zip(ids, record.ids, strict=True))
    torch.testing.assert_close(rerouted, served)
    for name, value in model.named_parameters():
        if value.grad is not None:
            torch.testing.assert_close(value.grad, gradients[name], msg=name)
    assert all(gradients[f"model.layers.{layer}.mlp.gate.weight"].any() for layer in range(2))


def test_bip_leaves_a_model_that_is_not_training_alone(tiny_moe: Callable[..., PreTrainedModel]) -> None:
    model = skewed(tiny_moe("glm4_moe")).eval()
    with ExitStack() as stack:
        stack.enter_context(objective_on(model, BipBalance()).attached())
        model.base_model(input_ids=tokens_of(2, 16))
    assert not any(router.e_score_correction_bias.any() for router in routers_of(model))


# Through the stage


def saved(model: PreTrainedModel, folder: Path) -> Artifact:
    train_bpe(["some text"], 300).save_pretrained(folder / "tokenizer")
    save_model(model, folder / "model", tokenizer_from=folder / "tokenizer", origins=ORIGINS)
    return Artifact(folder / "model", "mix", "m")


def corpus_in(folder: Path) -> dict[str, Artifact]:
    for number, domain in enumerate(("code", "math")):
        (folder / domain).mkdir(parents=True)
        ids = np.random.default_rng(number).integers(0, 300, 2000).astype(np.uint16)
        np.save(folder / domain / "train.npy", ids)
        np.save(folder / domain / "train_documents.npy", np.zeros(1, dtype=np.int64))
    return {domain: Artifact(folder / domain, "tokens", domain) for domain in ("code", "math")}


def job_in(folder: Path) -> Job:
    (folder / "out").mkdir(parents=True)
    (folder / "scratch").mkdir()
    return Job(out=folder / "out", scratch=folder / "scratch")


def served_violation(folder: Path, tokens: dict[str, Artifact], bias: float) -> float:
    """MaxVio, worst layer, of the stored model on text it was trained on, with its biases times `bias`."""
    model = load_model(folder)
    for router in routers_of(model):
        router.e_score_correction_bias *= bias
    domains = {name: PackedTokens.open(artifact.path, "train") for name, artifact in tokens.items()}
    with torch.no_grad(), record_routes(model) as record:
        model.base_model(input_ids=Mixture(domains, 32, 0).batch(0, 64).tokens_BS[:, :-1])
    return max(max_violation(expert_counts(ids_TK, 6)) for ids_TK in record.ids)


@pytest.mark.parametrize("loss", [LossFreeBalance(update_rate=0.02), BipBalance()])
def test_the_tuned_model_is_served_in_balance(
    loss: LossFreeBalance | BipBalance, tiny_moe: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model, tokens = saved(skewed(tiny_moe("glm4_moe")), tmp_path), corpus_in(tmp_path)
    optimizer = OptimizerConfig(learning_rate=1e-4, warmup_steps=0)
    training = TrainingConfig(
        steps=30, batch_size=16, accumulation=2, sequence_length=32, log_every=1, optimizer=optimizer
    )
    before = served_violation(model.path, tokens, 1.0)
    result = tune(TuneConfig(training=training, losses=(loss,)), model=model, tokens=tokens, job=job_in(tmp_path / "a"))
    assert before > 1
    assert served_violation(tmp_path / "a/out", tokens, 0.0) > 1
    assert served_violation(tmp_path / "a/out", tokens, 1.0) < 0.5
    assert result["max_violation"] < 0.3 if loss.type == "loss_free" else result["max_violation"] <= 0.05


@pytest.mark.parametrize("loss", [LossFreeBalance(), BipBalance()])
def test_routers_without_a_bias_are_refused_before_training(
    loss: LossFreeBalance | BipBalance, tiny_moe: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model, job = saved(tiny_moe("mixtral"), tmp_path), job_in(tmp_path / "job")
    config = TuneConfig(training=TrainingConfig(steps=2, sequence_length=16), losses=(loss,))
    with pytest.raises(ConfigError, match=rf"{loss.type} moves a correction bias.*MixtralTopKRouter.*selection: loss_"):
        tune(config, model=model, tokens=corpus_in(tmp_path), job=job)
    assert not list(job.scratch.iterdir())


def test_groups_are_heeded_by_loss_free_and_refused_by_bip(tiny_moe: Callable[..., PreTrainedModel]) -> None:
    model = tiny_moe("glm4_moe grouped").train()
    with pytest.raises(ConfigError, match=r"bip.*2 of 3 groups.*loss_free"):
        objective_on(model, BipBalance())
    objective = objective_on(skewed(model), LossFreeBalance(update_rate=0.02))
    tokens_BS = tokens_of(32, 17)
    violations = []
    with objective.attached(), torch.no_grad():
        for step in range(80):
            objective.begin(step, 80)
            model.base_model(input_ids=tokens_BS[:, :-1])
            objective.loss(micro(tokens_BS))
            objective.end()
            violations.append(objective.metrics()["max_violation"])
    assert violations[0] > 0.8
    assert violations[-1] < 0.3
    assert all(len(set((ids_K // 2).tolist())) <= 2 for ids_K in objective.record.ids[0])
