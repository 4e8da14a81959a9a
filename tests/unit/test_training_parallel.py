"""Workers that train together: the loss curve of one worker, shares, averaged gradients, resuming with others."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from moestro.artifacts import Job, SilentReporter
from moestro.config import (
    BipBalance,
    DomainSupervision,
    ErcLoss,
    GlobalBatchLoss,
    LossFreeBalance,
    MutualInformationLoss,
    OptimizerConfig,
    RandomPartition,
    RomaLoss,
    RoutingLossConfig,
    SwitchLoss,
    TrainingConfig,
    UncertainTokens,
    ZLoss,
)
from moestro.data.packed import Batch, Mixture, PackedTokens
from moestro.errors import ConfigError, LostWorkerError, ResourceError
from moestro.execution import NOWHERE
from moestro.training import parallel
from moestro.training.loop import train
from moestro.training.routing_losses import LOSSES, Context, routing_objective

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
RUN = TrainingConfig(steps=12, batch_size=8, accumulation=2, sequence_length=16, checkpoint_every=3, log_every=1)
EVERY_LOSS: list[RoutingLossConfig] = [
    SwitchLoss(coefficient=1.0),
    GlobalBatchLoss(coefficient=1.0),
    ZLoss(coefficient=0.1),
    LossFreeBalance(update_rate=0.01),
    BipBalance(),
    ErcLoss(),
    RomaLoss(coefficient=10.0, neighbours=1),
    MutualInformationLoss(coefficient=1.0),
    UncertainTokens(threshold=0.9),
    RandomPartition(),
    DomainSupervision(coefficient=1.0),
]
HERE = Path(__file__).parent
DEADLINE = 400.0

MEMBER = """
import json, sys
from pathlib import Path
import torch
import torch.distributed as dist
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
import test_training_parallel as tests
rank, workers, meeting, task, *arguments = sys.argv[2:]
if int(workers) > 1:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=int(rank), world_size=int(workers))
print(json.dumps(getattr(tests, task)(*arguments)))
"""


def together(folder: Path, workers: int, task: str, *arguments: str) -> list[object]:
    """What `task` of this module returns on every worker of a process group."""
    folder.mkdir(exist_ok=True)
    meeting = folder / f"meeting-{len(list(folder.glob('meeting-*')))}"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", MEMBER, str(HERE), str(rank), str(workers), str(meeting), task, *arguments],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(workers)
    ]
    meeting.touch()
    try:
        told = [process.communicate(timeout=DEADLINE)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * workers
    return [json.loads(text.splitlines()[-1]) for text in told]


def average(*_: str) -> object:
    """Gradients of a frozen, a missing, a half-missing and two full parameters, after averaging."""
    rank = dist.get_rank()
    sizes = (3, 5, 4, 6)
    parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
    parallel.BUCKET_ELEMENTS = 7
    parameters[0].grad = torch.full((3,), rank + 1.0)
    parameters[2].grad = torch.arange(4.0) if rank == 1 else None
    parameters[3].grad = torch.arange(6.0) * (rank + 1)
    parallel.average_gradients(parameters)
    found = [None if parameter.grad is None else parameter.grad.tolist() for parameter in parameters]
    return [found, parallel.mean(float(rank)), parallel.total(torch.tensor([1, 2])).tolist(), parallel.broadcast(rank)]


def test_gradients_are_averaged_and_none_stays_none(tmp_path: Path) -> None:
    first, second = together(tmp_path, 2, "average")
    assert first == second
    expected = [[1.5] * 3, None, [0.0, 0.5, 1.0, 1.5], [1.5 * value for value in range(6)]]
    assert first == [expected, 0.5, [2, 4], 0]


def shares(*_: str) -> object:
    tokens_BS = torch.arange(24).reshape(12, 2)
    batch = Batch(tokens_BS, torch.arange(12), tokens_BS > 20)  # type: ignore[arg-type]
    return parallel.share(batch, 3).domains_B.tolist()


def test_each_worker_takes_its_part_of_every_micro_batch(tmp_path: Path) -> None:
    assert together(tmp_path, 2, "shares") == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]


def test_a_batch_that_does_not_divide_is_refused() -> None:
    parallel.check_share(12, 3, 2)
    with pytest.raises(ConfigError, match=r"training.batch_size: 12 does not divide by 3 \(accumulation\) x 8 workers"):
        parallel.check_share(12, 3, 8)


def disagree(*_: str) -> object:
    assert parallel.agreed(7, "The step") == 7
    try:
        parallel.agreed(3 + dist.get_rank(), "The step")
    except ResourceError as error:
        return str(error)
    return ""


def test_workers_that_see_other_files_say_so(tmp_path: Path) -> None:
    first, second = together(tmp_path, 2, "disagree")
    assert first == ""
    assert str(second).startswith("The step is 4 on worker 1 and 3 on worker 0. The workers do not see the same files")


def lose(*_: str) -> object:
    if dist.get_rank() == 1:
        print("null", flush=True)  # noqa: T201
        os._exit(0)
    try:
        parallel.total(torch.ones(1))
    except LostWorkerError as error:
        return str(error)
    return ""


def test_a_lost_worker_is_named_as_such(tmp_path: Path) -> None:
    assert str(together(tmp_path, 2, "lose")[0]).startswith("A worker of the group was lost: ")


def model_of(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "dense":
        return LlamaForCausalLM(LlamaConfig(**SHAPE))
    return MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, sliding_window=None))


def mixture() -> Mixture:
    generator = np.random.default_rng(0)
    domains = {name: PackedTokens.of(generator.integers(0, 64, 600).astype(np.uint16)) for name in ("code", "math")}
    return Mixture(domains, RUN.sequence_length, seed=0)


class Interrupted(Exception):  # noqa: N818
    """The run is to end here."""


class Stop(SilentReporter):
    """Ends a run at a step, before its checkpoint."""

    def __init__(self, last: int) -> None:
        self.last = last

    def progress(self, done: int, total: int, message: str = "") -> None:  # noqa: ARG002
        if done == self.last:
            raise Interrupted


def run(kind: str, folder: Path, last: int = 0) -> Any:
    """Train a tiny model to the end, or until step `last`; its rows and weights' sums, None if it does not end."""
    model, domains = model_of(kind), mixture()
    (folder / "out").mkdir(parents=True, exist_ok=True)
    (folder / "scratch").mkdir(exist_ok=True)
    job = Job(out=NOWHERE if parallel.rank() else folder / "out", scratch=folder / "scratch", reporter=Stop(last))
    losses = (GlobalBatchLoss(coefficient=0.1), ZLoss(coefficient=0.01))
    origins = [["code", "math", "prose", "seed"]] * 2
    objective = routing_objective(losses, Context(model, origins, ("code", "math"))) if kind == "moe" else None
    try:
        train(model, domains, RUN, job=job, trainable=lambda _: True, auxiliary=objective)
    except (Interrupted, parallel.Followed):
        return None
    rows = json.loads((folder / "out" / "history.json").read_text())["steps"]
    return [rows, [float(value.detach().double().sum()) for value in model.parameters()]]


def runs_of_two(kind: str, root: str) -> object:
    folder = Path(root)
    undisturbed = run(kind, folder / "two")
    run(kind, folder / "mixed", last=8)
    run(kind, folder / "disturbed", last=7)
    return [undisturbed, run(kind, folder / "disturbed")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_two_workers_train_as_one_does_and_take_over_from_each_other(tmp_path: Path, kind: str) -> None:
    rows, sums = run(kind, tmp_path / "one")
    assert len(rows) == RUN.steps
    assert run(kind, tmp_path / "mixed", last=5) is None
    undisturbed, disturbed = cast("Any", together(tmp_path, 2, "runs_of_two", kind, str(tmp_path))[0])
    assert disturbed == undisturbed
    for other_rows, other_sums in (undisturbed, run(kind, tmp_path / "mixed")):
        for row, other in zip(rows, other_rows, strict=True):
            assert other["loss"] == pytest.approx(row["loss"], rel=1e-5)
            assert other == pytest.approx(row, rel=1e-4)
        assert other_sums == pytest.approx(sums, rel=1e-3, abs=1e-4)


def with_loss(config: RoutingLossConfig, folder: Path) -> Any:
    """Rows and correction biases of a run with one loss. In the first layer one domain alone has an own expert."""
    torch.manual_seed(0)
    if config.type in ("loss_free", "bip"):
        sparse = {"n_routed_experts": 4, "moe_intermediate_size": 32, "head_dim": 8, "first_k_dense_replace": 0}
        shape = SHAPE | sparse | {"num_experts_per_tok": 2, "initializer_range": 0.2, "pad_token_id": 0}
        model: PreTrainedModel = Glm4MoeForCausalLM(Glm4MoeConfig(**shape))
    else:
        sparse = {"num_local_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.2}
        model = MixtralForCausalLM(MixtralConfig(**SHAPE, **sparse, sliding_window=None))
    for part in ("out", "scratch"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    job = Job(out=NOWHERE if parallel.rank() else folder / "out", scratch=folder / "scratch")
    origins = [["code", "seed", "prose", "seed"], ["seed", "code", "math", "seed"]]
    objective = routing_objective([config], Context(model, origins, ("code", "math")))
    optimizer = OptimizerConfig(learning_rate=3e-3, warmup_steps=0)
    training = RUN.model_copy(update={"steps": 6, "optimizer": optimizer})
    uneven = Mixture(mixture().domains, RUN.sequence_length, seed=0, shares={"code": 1, "math": 2})
    try:
        train(model, uneven, training, job=job, trainable=lambda _: True, auxiliary=objective)
    except parallel.Followed:
        return None
    biases = [bias_E.tolist() for name, bias_E in model.named_buffers() if name.endswith("e_score_correction_bias")]
    return [json.loads((folder / "out" / "history.json").read_text())["steps"], biases]


def with_every_loss(root: str) -> object:
    return {config.type: with_loss(config, Path(root) / config.type) for config in EVERY_LOSS}


@pytest.fixture(scope="module")
def runs_of_two_workers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("two")
    return together(folder, 2, "with_every_loss", str(folder / "runs"))[0]


@pytest.mark.slow
@pytest.mark.parametrize("config", EVERY_LOSS, ids=lambda config: config.type)
def test_no_loss_depends_on_the_number_of_workers(
    config: RoutingLossConfig, runs_of_two_workers: Any, tmp_path: Path
) -> None:
    assert {type(one) for one in EVERY_LOSS} == set(LOSSES)
    (alone, biases), (together, other_biases) = with_loss(config, tmp_path), runs_of_two_workers[config.type]
    assert len(alone) == 6
    assert bool(biases) is (config.type in ("loss_free", "bip"))
    for bias_E, other_E in zip(biases, other_biases, strict=True):
        assert any(bias_E)
        assert other_E == pytest.approx(bias_E, rel=1e-3, abs=1e-4)
    for row, other in zip(alone, together, strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-5)
        assert other == pytest.approx(row, rel=1e-3, abs=1e-5)
