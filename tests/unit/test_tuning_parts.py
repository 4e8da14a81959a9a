"""Learning rates by group, frozen experts, and the losses that act on routing, through the `tune` stage."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import PreTrainedModel

from moestro.artifacts import Artifact, Job
from moestro.artifacts.job import SilentReporter
from moestro.config import OptimizerConfig, ParameterRates, TrainingConfig, TuneConfig
from moestro.data.tokenizer import train_bpe
from moestro.errors import ConfigError
from moestro.models.checkpoint import load_model, save_model
from moestro.models.routers import is_expert_weight, is_router_weight, is_shared_expert_weight
from moestro.training.frozen_experts import FrozenExperts
from moestro.training.learning_rates import RateFactors, expert_factor
from moestro.training.optimizer import build_optimizer
from moestro.tuning import token_share, tune

pytestmark = pytest.mark.usefixtures("one_thread")

Models = Callable[..., PreTrainedModel]
ORIGINS = [["code", "math", "prose", "seed", "code", "math"], ["seed", "code", "math", "seed", "seed", "prose"]]
FAST = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, weight_decay=0.1)
TRAINING = TrainingConfig(steps=4, batch_size=8, accumulation=2, sequence_length=16, log_every=1, optimizer=FAST)


def saved(model: PreTrainedModel, folder: Path) -> Artifact:
    train_bpe(["some text"], 300).save_pretrained(folder / "tokenizer")
    save_model(model, folder / "model", tokenizer_from=folder / "tokenizer", origins=ORIGINS)
    return Artifact(folder / "model", "mix", "m")


def tokens_in(folder: Path) -> dict[str, Artifact]:
    """Two domains with alphabets of their own."""
    for number, domain in enumerate(("code", "math")):
        (folder / domain).mkdir(parents=True)
        ids = np.random.default_rng(number).integers(150 * number, 150 * (number + 1), 800).astype(np.uint16)
        np.save(folder / domain / "train.npy", ids)
        np.save(folder / domain / "train_documents.npy", np.zeros(1, dtype=np.int64))
    return {domain: Artifact(folder / domain, "tokens", domain) for domain in ("code", "math")}


class Tuner:
    """Tunes one model in folders of their own."""

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        self.folder = folder
        self.model, self.tokens = saved(model, folder), tokens_in(folder)

    def job(self, name: str) -> Job:
        out = self.folder / name / "out"
        out.mkdir(parents=True)
        (self.folder / name / "scratch").mkdir(exist_ok=True)
        return Job(out=out, scratch=self.folder / name / "scratch")

    def tune(self, name: str, **fields: Any) -> dict[str, torch.Tensor]:
        """The tuned weights, as transformers holds them in memory."""
        config = TuneConfig.model_validate({"training": TRAINING, "losses": [], **fields})
        tune(config, model=self.model, tokens=self.tokens, job=self.job(name))
        return weights_of(self.folder / name / "out")

    def history(self, name: str) -> list[dict[str, float]]:
        return json.loads((self.folder / name / "out/history.json").read_text())["steps"]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in load_model(folder).state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def group_of(name: str) -> str:
    found = {"experts": is_expert_weight, "shared_experts": is_shared_expert_weight, "routers": is_router_weight}
    return next((group for group, belongs in found.items() if belongs(name)), "others")


def test_the_groups_of_a_model_with_shared_experts(tiny_moe: Models) -> None:
    for kind, shared in (("qwen2_moe", 3), ("glm4_moe", 3), ("granitemoe", 0)):
        names = [name for name, _ in tiny_moe(kind).named_parameters()]
        groups = [group_of(name) for name in names]
        assert groups.count("experts") == 2 * 2
        assert groups.count("shared_experts") == 2 * shared
        assert groups.count("routers") == 2 * (2 if kind == "qwen2_moe" else 1)
        assert all("shared_expert_gate" not in name for name in names if is_shared_expert_weight(name))


def test_auto_is_the_square_root_of_the_share_of_tokens(tiny_moe: Models) -> None:
    model = tiny_moe("mixtral")
    for losses, share in (
        ([], 2 / 6),
        ([{"type": "mutual_information"}], 1.0),
        ([{"type": "global_batch"}, {"type": "random_partition"}], 1 / 6),
    ):
        config = TuneConfig.model_validate({"training": TRAINING, "losses": losses, "rates": {"experts": "auto"}})
        assert token_share(model, config) == pytest.approx(share)
        factors = RateFactors.of(config.rates, token_share(model, config))
        assert factors == RateFactors(experts=pytest.approx(share**0.5))
    assert expert_factor(1 / 16) == 0.25


def test_the_square_root_is_the_rule_of_small_batches() -> None:
    """lr(s B) / lr(B) of the rule that Hunyuan-Large starts from; its reported 0.31 lies on it."""

    def best(batch: float) -> float:
        return 2 / ((1 / batch) ** 0.5 + batch**0.5)  # in units of the noise scale

    for share in (1 / 16, 1 / 3):
        assert best(share * 1e-6) / best(1e-6) == pytest.approx(expert_factor(share), rel=1e-5)
    assert best(0.26 / 16) / best(0.26) == pytest.approx(0.31, abs=0.001)


def test_each_group_steps_by_its_own_rate_through_the_schedule(tiny_moe: Models) -> None:
    """AdamW's first step moves a weight by the learning rate, after decay by rate times weight decay."""
    model = tiny_moe("qwen2_moe").train()
    factors = RateFactors(experts=0.5, shared_experts=0.25, routers=3.0, others=2.0)
    config = OptimizerConfig(learning_rate=1e-3, warmup_steps=2, weight_decay=0.1, schedule="constant")
    optimizer, schedule = build_optimizer(model, config, 10, factors)
    assert len(optimizer.param_groups) == 5  # decayed experts, shared experts and others; exempt routers and others
    for warmup in (0.5, 1.0):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        schedule.step()
        for name, parameter in model.named_parameters():
            rate = warmup * 1e-3 * getattr(factors, group_of(name))
            exempt = parameter.dim() < 2 or is_router_weight(name) or "embed" in name
            expected = before[name] * (1 - (0 if exempt else rate * 0.1)) - rate
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("rates", "trainable"),
    [
        ({"experts": 0}, "non_experts"),
        ({"shared_experts": 0, "others": 0, "routers": 0}, "experts"),
        ({"experts": 0, "shared_experts": 0, "others": 0}, "router"),
    ],
)
def test_a_factor_of_nothing_equals_not_training(
    tiny_moe: Models, tmp_path: Path, rates: dict[str, float], trainable: str
) -> None:
    tuner = Tuner(tiny_moe("glm4_moe"), tmp_path)
    assert same(tuner.tune("rates", rates=rates), tuner.tune("trainable", trainable=trainable))
    assert tuner.history("rates") == tuner.history("trainable")  # its gradient's norm too


def test_rates_of_one_change_nothing_and_the_logged_rate_is_the_base(tiny_moe: Models, tmp_path: Path) -> None:
    tuner = Tuner(tiny_moe("granitemoe"), tmp_path)
    plain = tuner.tune("plain")
    assert same(plain, tuner.tune("ones", rates={"experts": 1.0, "routers": 1}))
    scaled = tuner.tune("scaled", rates={"experts": "auto", "others": 0.5})
    assert not same(plain, scaled)
    rates = [[row["learning_rate"] for row in tuner.history(name)] for name in ("plain", "scaled")]
    assert rates[0] == rates[1]


def test_rates_that_make_no_sense(tiny_moe: Models, tmp_path: Path) -> None:
    for wrong in ({"experts": -0.1}, {"experts": "most"}, {"routers": -1}):
        with pytest.raises(ValidationError):
            ParameterRates.model_validate(wrong)
    tuner = Tuner(tiny_moe("mixtral"), tmp_path)
    with pytest.raises(ConfigError, match=r"No parameter is left to train.*raise a factor of `rates`"):
        tuner.tune("nothing", trainable="non_experts", rates={"routers": 0, "others": 0})  # there is no shared one
    for fields in ({"trainable": "router"}, {"trainable": "non_experts"}, {"rates": {"experts": 0}}):
        with pytest.raises(ValidationError, match="random_partition averages what the experts learn"):
            TuneConfig.model_validate({"training": TRAINING, "losses": [{"type": "random_partition"}], **fields})


@pytest.mark.parametrize("name", ["loss_free", "bip"])
@pytest.mark.parametrize("fields", [{"trainable": "experts"}, {"rates": {"routers": 0}}])
def test_a_bias_does_not_move_where_routers_do_not_train(name: str, fields: dict[str, Any]) -> None:
    losses = [{"type": name}]
    with pytest.raises(ValidationError, match=rf"{name} moves the routers' correction bias.*leave it out"):
        TuneConfig.model_validate({"training": TRAINING, "losses": losses, **fields})
    for trainable in ("all", "router", "non_experts"):
        TuneConfig.model_validate({"training": TRAINING, "losses": losses, "trainable": trainable})


def test_roma_needs_its_neighbours_in_every_micro_batch() -> None:
    """With 2 neighbours 5 sequences: 3 in the better half, of which each has 2 others."""
    losses = [{"type": "roma", "neighbours": 2}]
    TuneConfig.model_validate({"training": {"steps": 1, "batch_size": 10, "accumulation": 2}, "losses": losses})
    for batch_size, accumulation in ((4, 1), (10, 10), (16, 4)):
        training = {"steps": 1, "batch_size": batch_size, "accumulation": accumulation}
        with pytest.raises(ValidationError, match=r"takes 5 sequences; batch_size .* makes [14]: raise batch_size"):
            TuneConfig.model_validate({"training": training, "losses": losses})


def test_frozen_experts_stay_as_they_are(tiny_moe: Models, moe_kind: str, tmp_path: Path) -> None:
    """Against decay, moments and averaging over experts; their neighbours in the same tensor move."""
    tuner = Tuner(tiny_moe(moe_kind), tmp_path)
    before = weights_of(tuner.model.path)
    for name, losses in (("plain", []), ("averaged", [{"type": "random_partition"}])):
        after = tuner.tune(name, losses=losses, frozen_experts=["code", "prose"])
        for layer, origins in enumerate(ORIGINS):
            tensors = [key for key in before if f"layers.{layer}." in key and is_expert_weight(key)]
            assert len(tensors) == 2
            for key in tensors:
                stayed = [torch.equal(before[key][row], after[key][row]) for row in range(6)]
                assert stayed == [origin in ("code", "prose") for origin in origins], (name, key)


def test_frozen_experts_do_not_count_in_the_norm(tiny_moe: Models) -> None:
    model = tiny_moe("mixtral")
    frozen = FrozenExperts(model, ORIGINS, ["code"])
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    whole = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])) ** 2
    frozen.empty_gradients()
    rest = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])) ** 2
    one_expert = 3 * 64 * 96
    assert whole - rest == pytest.approx(3 * one_expert, rel=1e-3)  # two in the first layer, one in the second


def test_experts_that_are_not_there_cannot_be_frozen(tiny_moe: Models, tmp_path: Path) -> None:
    tuner = Tuner(tiny_moe("mixtral"), tmp_path)
    with pytest.raises(ConfigError, match=r"no expert comes from 'law'\..*code, math, prose, seed"):
        tuner.tune("law", frozen_experts=["code", "law"])


EVERY_LOSS: dict[str, dict[str, Any]] = {
    "roma": {"losses": [{"type": "roma", "neighbours": 1}, {"type": "global_batch"}], "trainable": "router"},
    "mutual_information": {"losses": [{"type": "mutual_information"}]},
    "uncertain_tokens": {"losses": [{"type": "uncertain_tokens", "threshold": 0.5}]},
    "random_partition": {"losses": [{"type": "random_partition"}, {"type": "global_batch"}]},
    "domain_supervision": {"losses": [{"type": "domain_supervision"}]},
    "rates and frozen experts": {"rates": {"experts": "auto", "routers": 2.0}, "frozen_experts": ["code"]},
}
FIGURES = {
    "roma": {"routing_distance"},
    "mutual_information": {"mutual_information"},
    "uncertain_tokens": {"uncertain_tokens"},
    "random_partition": {"expert_distance", "averaging_share"},
    "domain_supervision": {"domain_supervision", "own_expert/code", "own_expert/math"},
    "rates and frozen experts": set(),
}


class StoppedError(Exception):
    """Raised by a reporter in mid-training."""


class Stopping(SilentReporter):
    """Stops the run in the third step."""

    def progress(self, done: int, total: int, message: str = "") -> None:  # noqa: ARG002
        if done == 3:
            raise StoppedError


@pytest.mark.parametrize("kind", ["mixtral", "granitemoe", "glm4_moe"])
@pytest.mark.parametrize("name", EVERY_LOSS)
def test_an_interrupted_run_ends_in_the_same_bytes(tiny_moe: Models, tmp_path: Path, name: str, kind: str) -> None:
    tuner = Tuner(tiny_moe(kind), tmp_path)
    training = TRAINING.model_copy(update={"checkpoint_every": 2})
    straight = tuner.tune("straight", training=training, **EVERY_LOSS[name])

    config = TuneConfig.model_validate({"training": training, "losses": [], **EVERY_LOSS[name]})
    job = tuner.job("resumed")
    with pytest.raises(StoppedError):
        tune(config, model=tuner.model, tokens=tuner.tokens, job=replace(job, reporter=Stopping()))
    tune(config, model=tuner.model, tokens=tuner.tokens, job=job)
    assert same(straight, weights_of(job.out))
    assert tuner.history("straight") == tuner.history("resumed")
    assert set(tuner.history("straight")[-1]) >= FIGURES[name]
