"""Runs that diverge: what the guard sees of losses, what the last step left, and which checkpoint stays good."""

import math
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from moestro.artifacts import Job
from moestro.config import OptimizerConfig, RoutingLossConfig, SwitchLoss, TrainingConfig, ZLoss
from moestro.data.packed import Mixture, PackedTokens
from moestro.errors import TrainingError
from moestro.training.divergence import WINDOW, DivergenceGuard
from moestro.training.history import TrainingResult
from moestro.training.loop import train
from moestro.training.objective import next_token_loss
from moestro.training.routing_losses import Context, routing_objective

pytestmark = pytest.mark.usefixtures("one_thread")

S = 16
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIG = TrainingConfig(
    steps=20,
    batch_size=4,
    sequence_length=S,
    checkpoint_every=3,
    optimizer=OptimizerConfig(learning_rate=2e-2, warmup_steps=0, schedule="constant"),
)


def model_of(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def tokens(seed: int, count: int = 400) -> PackedTokens:
    """Noise: what is learnt of it is learnt by heart, so the loss on other noise soon rises."""
    return PackedTokens.of(np.random.default_rng(seed).integers(0, 64, count).astype(np.uint16))


class Breaking:
    """Breaks the model's output head after a step, by what it is multiplied with."""

    def __init__(self, model: PreTrainedModel, step: int, factor: float) -> None:
        self.model, self.step, self.factor = model, step, factor

    def progress(self, done: int, _total: int, _message: str = "") -> None:
        if done == self.step:
            with torch.no_grad():
                self.model.lm_head.weight.mul_(self.factor)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Not told."""


def run(
    folder: Path, config: TrainingConfig, *, broken_at: int = 0, factor: float = 1.0, **optimizer: float
) -> TrainingResult:
    for name in ("out", "scratch"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    model = model_of()
    job = Job(out=folder / "out", scratch=folder / "scratch", reporter=Breaking(model, broken_at, factor))
    config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update=optimizer)})
    return train(model, Mixture({"noise": tokens(0)}, S, seed=0), config, job=job, trainable=lambda _: True)


def train_sparse(model: PreTrainedModel, losses: list[RoutingLossConfig], folder: Path) -> TrainingResult:
    for name in ("out", "scratch"):
        (folder / name).mkdir()
    job = Job(out=folder / "out", scratch=folder / "scratch", reporter=Breaking(model, 0, 1.0))
    objective = routing_objective(losses, Context(model, [], ("noise",)))
    mixture = Mixture({"noise": tokens(0)}, S, seed=0)
    return train(model, mixture, CONFIG, job=job, trainable=lambda _: True, auxiliary=objective)


def diverges_at(losses: list[float], vocabulary: int = 50_000) -> int | None:
    guard = DivergenceGuard(vocabulary, [])
    for step, loss in enumerate(losses, 1):
        try:
            guard.watch(loss)
        except TrainingError:
            return step
    return None


def noisy(losses: list[float]) -> list[float]:
    generator = random.Random(0)
    return [loss + generator.gauss(0, 0.2) for loss in losses]


def test_what_diverges() -> None:
    half = WINDOW // 2
    learnt = [10.8 - 7 * min(1, step / 200) for step in range(400)]
    lost = diverges_at(noisy([*learnt, *[7.5] * 100]))
    assert lost is not None
    assert 400 + half <= lost <= 400 + half + 2
    assert diverges_at(noisy([2.5, *[7.5] * 100])) == WINDOW
    worse_than_nothing = diverges_at(noisy([10.8 + step * 0.1 for step in range(100)]))
    assert worse_than_nothing is not None
    assert worse_than_nothing < 50


def test_a_small_vocabulary_leaves_room_to_see_a_collapse() -> None:
    collapsed = [5.7 - 1.7 * min(1, step / 60) for step in range(100)] + [5.7] * 100
    lost = diverges_at(noisy(collapsed), vocabulary=300)
    assert lost is not None
    assert 100 + WINDOW // 2 <= lost <= 100 + WINDOW
    forgets_a_part = [5.7 - 1.7 * min(1, step / 60) for step in range(100)] + [5.0] * 100
    assert diverges_at(noisy(forgets_a_part), vocabulary=300) is None
    assert diverges_at(noisy([4.9] * 100 + [5.7] * 100), vocabulary=300) is None


def ends_diverged(losses: list[float], vocabulary: int = 50_000) -> bool:
    guard = DivergenceGuard(vocabulary, losses)
    try:
        guard.finish()
    except TrainingError as error:
        return "by its end: the lowest loss of the last 8 steps is" in str(error)
    return False


def test_a_run_that_ends_diverged() -> None:
    learnt = [10.8 - 7 * min(1, step / 200) for step in range(400)]
    assert diverges_at(noisy([*learnt, *[7.5] * 12])) is None
    assert ends_diverged(noisy([*learnt, *[7.5] * 12]))
    assert ends_diverged([4.2 - 0.3 * min(step, 8) for step in range(12)] + [4.2] * 12, vocabulary=64)
    assert ends_diverged([4.9 * 1.25**step for step in range(31)], vocabulary=64)
    assert not ends_diverged(noisy([*learnt, *[20.0] * 5]))
    assert not ends_diverged([0.2, 6.0] * 12)


@pytest.mark.parametrize("steps", [*range(4, 20), 24, 31, 32, 33, 40])
def test_ordinary_short_runs_do_not_diverge(steps: int) -> None:
    generator = random.Random(steps)
    for vocabulary in (64, 300, 50_000):
        start = math.log(vocabulary)
        for domain in (0.0, 0.2, 0.4):
            for warm_up in (0.0, 1.0):
                falling = [start * (0.4 + 0.6 * math.exp(-4 * step / steps)) for step in range(steps)]
                losses = [
                    loss
                    + generator.gauss(0, 0.5)
                    + generator.choice([-domain, domain]) * loss
                    + warm_up * math.exp(-(((step - steps / 4) / 3) ** 2))
                    for step, loss in enumerate(falling)
                ]
                assert diverges_at(losses, vocabulary) is None
                assert not ends_diverged(losses, vocabulary)


def test_weights_are_good_while_their_loss_is_near_the_best() -> None:
    learnt = noisy([10.8 - 7 * min(1, step / 200) for step in range(300)])
    guard = DivergenceGuard(50_000, [*learnt, *noisy([7.5] * 100)])
    assert all(guard.good(step) for step in range(300))
    assert not any(guard.good(step) for step in range(300, 401))
    broken_at_once = DivergenceGuard(64, [4.9, 60.0, 300.0, *[900.0] * 40])
    assert not any(broken_at_once.good(step) for step in range(1, 44))
    domains = DivergenceGuard(50_000, [0.2, 6.0] * 20)
    assert all(domains.good(step) for step in range(8, 40))


def test_what_does_not_diverge() -> None:
    learnt = noisy([10.8 - 7 * min(1, step / 200) for step in range(400)])
    assert diverges_at(learnt) is None
    spike = [*learnt[:300], *[20.0] * (WINDOW // 2 - 2), *learnt[300:]]
    assert diverges_at(spike) is None
    warm_up = noisy([2.5 + 1.2 * max(0.0, 1 - abs(step - 60) / 60) for step in range(200)])
    assert diverges_at(warm_up) is None
    assert diverges_at(noisy([0.5, 3.5] * 100)) is None
    assert diverges_at(noisy([14.0] * 100)) is None


def test_a_resumed_guard_judges_as_an_undisturbed_one() -> None:
    losses = [2.0] * 40 + [6.0] * 20
    step = diverges_at(losses)
    assert step is not None
    guard = DivergenceGuard(50_000, losses[: step - 1])
    with pytest.raises(TrainingError, match=f"by step {step}: .* lowest median of 32 steps was 2.00") as caught:
        guard.watch(losses[step - 1])
    assert "learning_rate" in caught.value.hint


def loss_of(checkpoint: Path) -> float:
    """Of the training text, with the weights in it."""
    model = model_of().eval()
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["parameters"], strict=False)
    windows = torch.from_numpy(tokens(0).ids[: 20 * 17].reshape(20, 17).astype(np.int64))
    return float(next_token_loss(model, windows)[0].detach())


def test_a_rate_that_diverges_stops_the_run_and_keeps_a_good_checkpoint(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"steps": 200, "checkpoint_every": 2})
    message = r"diverged by step \d+: the median loss of the last 32 steps is .* good checkpoint is (\S+)\."
    with pytest.raises(TrainingError, match=message) as caught:
        run(tmp_path, config, broken_at=9, factor=-30)
    assert caught.value.hint.endswith("the same config ends the same way.")
    named = re.search(message, str(caught.value))
    assert named
    good, kept = Path(named[1]), sorted((tmp_path / "scratch/training").glob("step-*.pt"))
    assert len(kept) == 3
    assert good == kept[0]
    assert good.name.startswith("step-00000008-")
    uniform = math.log(64)
    assert loss_of(good) < uniform + 0.5
    assert all(loss_of(checkpoint) > uniform + 1 for checkpoint in kept[1:])
    with pytest.raises(TrainingError, match=message) as again:
        run(tmp_path, config)
    assert str(good) in str(again.value)


@pytest.mark.parametrize(
    ("rate", "steps", "message"),
    [
        (3.0, 31, "diverged by its end: the lowest loss of the last 8 steps is"),
        (
            3.0,
            3,
            r"broken weights: with them the batch of step 1 costs \d{2,}\.\S+ nats .*; at that step it cost 4\.\d\d",
        ),
        (30.0, 1, r"broken weights: with them the batch of step 1 costs \d{2,}\.\S+ nats"),
        (1e30, 1, r"broken weights: .* costs 4.16 nats per token and has a gradient of norm nan"),
        (1e38, 1, r"update of step 1 left values in \S+ that are not finite"),
    ],
)
def test_a_short_run_that_diverges_is_refused(tmp_path: Path, rate: float, steps: int, message: str) -> None:
    for _ in range(2):  # the same again ends the same way, and says so
        with pytest.raises(TrainingError, match=message) as caught:
            run(tmp_path, CONFIG.model_copy(update={"steps": steps}), learning_rate=rate)
        assert "There is no good checkpoint from before." in str(caught.value)
        assert "Lower `learning_rate`" in caught.value.hint
    assert not (tmp_path / "out/history.json").exists()


def test_a_last_update_that_breaks_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"ended with broken weights: .* good checkpoint is \S+step-00000018"):
        run(tmp_path, CONFIG, broken_at=20, factor=-30)
    assert not (tmp_path / "out/history.json").exists()


@pytest.mark.parametrize("steps", [1, 2, 5, 17])
def test_an_ordinary_short_run_ends_well(tmp_path: Path, steps: int) -> None:
    assert run(tmp_path, CONFIG.model_copy(update={"steps": steps})).steps == steps


def test_a_checkpoint_whose_next_loss_is_nan_is_not_the_good_one(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"checkpoint_every": 1})
    message = r"at step 8: .* noise \(windows (\d+, ){3}\d+\)\. The last good checkpoint is \S+step-00000006-"
    for broken_at in (7, 0):  # the second run takes up what the first has saved after it was broken
        with pytest.raises(TrainingError, match=message) as caught:
            run(tmp_path, config, broken_at=broken_at, factor=1e37)
        assert "the same config and data end the same way" in caught.value.hint


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    message = r"update of step 9 left values in lm_head.weight that are not finite. .* is \S+step-00000006-"
    with pytest.raises(TrainingError, match=message):
        run(tmp_path, CONFIG, broken_at=9, factor=math.inf)


@pytest.mark.parametrize(
    ("coefficients", "message"),
    [
        ({"z_loss": 1e300}, "z_loss of tune.losses makes the gradient's norm (nan|inf). Without, it is finite"),
        ({"z_loss": 1e-3, "switch": 1e38}, "step 1: switch of tune.losses makes"),
        ({"z_loss": 1e300, "switch": 1e300}, "z_loss and switch of tune.losses make the"),
    ],
)
def test_a_routing_loss_that_is_not_finite_is_named_and_not_the_data(
    tiny_moe: Callable[..., PreTrainedModel], tmp_path: Path, coefficients: dict[str, float], message: str
) -> None:
    model = tiny_moe("mixtral")
    losses = {"z_loss": ZLoss, "switch": SwitchLoss}
    configs = [losses[name](coefficient=value) for name, value in coefficients.items()]
    with pytest.raises(TrainingError, match=message) as caught:
        train_sparse(model, configs, tmp_path)
    assert (
        f"Lower the `coefficient` of {' and '.join(n for n, c in coefficients.items() if c > 1)}" in caught.value.hint
    )
    assert "windows" not in str(caught.value)


def test_weights_whose_gradient_is_not_finite_are_not_blamed_on_a_routing_loss(
    tiny_moe: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model = tiny_moe("mixtral")
    model.get_output_embeddings().weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TrainingError, match=r"step 1: the gradient's norm is (nan|inf)\. Its batch: noise"):
        train_sparse(model, [ZLoss()], tmp_path)
