"""The rl stage with the real engine on a tiny Mixtral: learning, resuming, refusing."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from moestro.artifacts import Artifact, Job, SilentReporter
from moestro.config import (
    Cispo,
    Correction,
    FunctionReward,
    GradedReward,
    Gspo,
    KlPenalty,
    OptimizerConfig,
    Resources,
    RlConfig,
    TaskConfig,
)
from moestro.data.tasks import Problem, Task
from moestro.data.tokenizer import train_bpe
from moestro.errors import ConfigError, InputError, LostWorkerError, TrainingError
from moestro.inference.engine import EngineConfig, VllmEngine
from moestro.models.checkpoint import load_model, save_model
from moestro.rl import rl
from moestro.rl.records import read_record
from moestro.rl.sampling import as_batch
from moestro.rl.update import Learner, prepare, update
from moestro.training.optimizer import build_optimizer
from moestro.training.runtime import deterministic

STEPS = 3
SHAPE = {
    "vocab_size": 288,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 96,
    "initializer_range": 0.12,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


class InterruptedRunError(RuntimeError):
    pass


class InterruptingReporter(SilentReporter):
    def __init__(self, at: int) -> None:
        self.at = at

    def metrics(self, values: Mapping[str, float], step: int) -> None:  # noqa: ARG002
        if step == self.at:
            raise InterruptedRunError


class KeepingReporter(SilentReporter):
    def __init__(self) -> None:
        self.kept: dict[str, float] = {}

    def metrics(self, values: Mapping[str, float], step: int) -> None:  # noqa: ARG002
        self.kept |= values


class PrintingReporter(SilentReporter):
    def metrics(self, values: Mapping[str, float], step: int) -> None:  # noqa: ARG002
        print(step, flush=True)  # noqa: T201  (the test reads it)


class DeafEngine(VllmEngine):
    """Takes no new weights and does not say so: what a broken weight refresh looks like from outside."""

    def refresh(self, folder: Path) -> None:
        pass


class MisalignedEngine(VllmEngine):
    """Reports routing one row late."""

    def _routes(self, routes: Any, rows: int) -> Any:
        return super()._routes(routes[[0, *range(rows - 1)]], rows)


class MistakenEngine(VllmEngine):
    """Gives its own tokens other log-probabilities than its weights do."""

    def generate(self, *args: Any) -> Any:
        groups = super().generate(*args)
        return [[replace(answer, logprobs=answer.logprobs - 0.1) for answer in group] for group in groups]


class DyingEngine(VllmEngine):
    """Dies in the middle of the second batch of rollouts, as often as `deaths` says."""

    deaths = 1
    left = 0
    asked = 0

    def generate(self, *args: Any) -> Any:
        type(self).asked += 1
        if type(self).asked >= 2 and type(self).left:
            type(self).left -= 1
            raise LostWorkerError("The rollout engine died.")
        return super().generate(*args)


def config(**changes: Any) -> RlConfig:
    settings: dict[str, Any] = {
        "task": TaskConfig(name="chain_sum", arguments={"max_terms": 2, "max_digits": 2}),
        "rewards": (GradedReward(),),
        "steps": STEPS,
        "prompts_per_step": 6,
        "num_generations": 4,
        "max_tokens": 8,
        "mini_steps": 2,
        "micro_batch_size": 5,
        "optimizer": OptimizerConfig(learning_rate=1e-2, warmup_steps=0, weight_decay=0.0, schedule="constant"),
    }
    return RlConfig(**settings | changes)


def digits(_task: Task, _problem: Problem, completion: str) -> float:
    """A reward that a random model already earns a little of."""
    return sum(character.isdigit() for character in completion) / max(1, len(completion))


def run(source: Path, base: Path, reporter: Any, *, engine: Any = VllmEngine, **changes: Any) -> dict[str, Any]:
    scratch, out = base / "scratch", base / f"out-{len(list(base.glob('out-*')))}"
    scratch.mkdir(parents=True, exist_ok=True)
    out.mkdir()
    job = Job(out=out, scratch=scratch, reporter=reporter, resources=Resources(cpus=2))
    with patch.object(Task, "score", digits):
        return rl(config(**changes), model=Artifact(source, "tune", "0" * 64), engine=engine, job=job)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def last_out(base: Path) -> Path:
    return sorted(base.glob("out-*"))[-1]


def no_engine(_folder: Path, _config: EngineConfig) -> VllmEngine:
    raise AssertionError("no engine must be started")


def make_tokenizer(folder: Path) -> None:
    train_bpe(["Question: What is 1 + 2?\nAnswer: 3\n"] * 3, 288).save_pretrained(folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2)).save_pretrained(folder)
    make_tokenizer(folder)
    (folder / "experts.json").write_text(json.dumps({"origins": [["code", "math", "prose", "seed"]] * 2}))
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory):
    base = tmp_path_factory.mktemp("undisturbed")
    return run(source, base, SilentReporter()), last_out(base)


def test_replay_on_a_dense_model_is_refused_before_any_work(dense, tmp_path):
    with pytest.raises(ConfigError, match="dense"):
        run(dense, tmp_path, SilentReporter(), engine=no_engine)


def test_prompts_that_leave_no_room_are_refused_before_an_engine_starts(source, tmp_path):
    with pytest.raises(InputError, match=r"rl\.max_tokens 80 do not fit into the model's 96 positions"):
        run(source, tmp_path, SilentReporter(), engine=no_engine, max_tokens=80)


@pytest.fixture
def moe(tiny_moe, tmp_path):
    """Makes a checkpoint of a kind that the task's tokenizer fits."""

    def make(kind, **fields):
        folder = tmp_path / "moe"
        make_tokenizer(folder)
        model = tiny_moe(kind, vocab_size=288, max_position_embeddings=96, initializer_range=0.12, **fields)
        save_model(model, folder, tokenizer_from=folder, origins=[["seed"] * 6] * 2)
        return folder

    return make


def test_replay_of_routing_that_vllm_does_not_return_is_refused_before_an_engine_starts(moe, tmp_path):
    with pytest.raises(InputError, match=r"all its layers slide over 12 positions.*Set rl\.routing to r2 or off"):
        run(moe("mixtral", sliding_window=12), tmp_path, SilentReporter(), engine=no_engine)


@pytest.mark.slow
def test_a_model_without_returned_routing_trains_without_replay(moe, tmp_path):
    result = run(moe("mixtral", sliding_window=12), tmp_path, SilentReporter(), routing="off", steps=1)
    (row,) = json.loads((last_out(tmp_path) / "history.json").read_text())["steps"]
    assert "r3/router_mismatch" not in row
    assert result["max_refresh_difference"] <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2_moe", "granitemoe", "glm4_moe grouped", "flex_olmo"])
def test_every_routing_is_replayed(moe, tmp_path, kind):
    result = run(moe(kind), tmp_path, SilentReporter(), steps=1)
    (row,) = json.loads((last_out(tmp_path) / "history.json").read_text())["steps"]
    assert row["r3/used_mismatch"] == 0
    assert row["r3/router_mismatch"] == 0
    assert row["sampling/logp_difference/max"] <= 1e-4
    assert result["max_refresh_difference"] <= 1e-4
    assert row["grad_norm"] > 0


@pytest.mark.slow
def test_a_run_learns_and_its_figures_hold(undisturbed):
    result, out = undisturbed
    steps = json.loads((out / "history.json").read_text())["steps"]
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert result["reward_last"] > result["reward_first"] > 0
    assert result["reward_first"] == pytest.approx((steps[0]["reward"] + steps[1]["reward"]) / 2)
    assert result["max_refresh_difference"] <= 1e-4
    for row in steps:
        assert row["r3/used_mismatch"] == 0
        assert 0 <= row["r3/k3_kl"] <= 1e-8
        assert row["sampling/logp_difference/max"] <= 1e-4
        assert row["grad_norm"] > 0
        assert 1 <= row["completions/mean_length"] <= 8
    assert not any("second" in name for row in steps for name in row)
    assert json.loads((out / "experts.json").read_text())["origins"][1] == ["code", "math", "prose", "seed"]


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, STEPS])
def test_an_interrupted_run_ends_in_the_same_bytes(source, undisturbed, tmp_path, at):
    with pytest.raises(InterruptedRunError):
        run(source, tmp_path, InterruptingReporter(at))
    engine = no_engine if at == STEPS else VllmEngine
    result = run(source, tmp_path, SilentReporter(), engine=engine)
    assert digests(last_out(tmp_path)) == digests(undisturbed[1])
    assert result["rollout_tokens_per_second"] > 0


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_bytes(source, undisturbed, tmp_path):
    code = (
        "import importlib.util, pathlib\n"
        f"spec = importlib.util.spec_from_file_location('rl_stage_tests', {str(Path(__file__))!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "module.torch.set_num_threads(2)\n"
        f"module.run(pathlib.Path({str(source)!r}), pathlib.Path({str(tmp_path)!r}), module.PrintingReporter())\n"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert [process.stdout.readline().strip() for _ in range(2)] == ["0", "1"]  # 0: the probe before the first
        os.kill(process.pid, signal.SIGKILL)
    resumed = subprocess.run(command, capture_output=True, text=True, timeout=500, check=True)
    assert resumed.stdout.split()[-1] == "3"
    assert digests(last_out(tmp_path)) == digests(undisturbed[1])


@pytest.mark.slow
def test_a_refresh_that_does_not_take_stops_the_run(source, tmp_path):
    with pytest.raises(TrainingError, match=r"rl step 1: after the weight refresh.* nats.*0\.001"):
        run(source, tmp_path, SilentReporter(), engine=DeafEngine)


@pytest.mark.slow
def test_misaligned_routing_stops_the_run(source, tmp_path):
    with pytest.raises(TrainingError, match="routing is not where it belongs"):
        run(source, tmp_path, SilentReporter(), engine=MisalignedEngine)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"max_staleness": 1, "correction": Correction()}])
def test_an_engine_that_does_not_agree_in_float32_stops_the_run_before_the_first_update(source, tmp_path, fields):
    with pytest.raises(TrainingError, match=r"before the first update, .* differ by up to 0\.1"):
        run(source, tmp_path, SilentReporter(), engine=MistakenEngine, routing="off", **fields)


@pytest.mark.slow
def test_a_mixture_of_experts_from_elsewhere_is_trained_too(source, tmp_path):
    stock = tmp_path / "stock"
    shutil.copytree(source, stock, ignore=shutil.ignore_patterns("experts.json"))
    assert run(stock, tmp_path, SilentReporter(), steps=1)["routing"] == "r3"
    assert not (last_out(tmp_path) / "experts.json").exists()


@pytest.mark.slow
def test_a_dense_model_trains_without_replay(dense, tmp_path):
    reporter = KeepingReporter()
    result = run(dense, tmp_path, reporter, routing="off", steps=2)
    for name in ("rollout/tokens_per_second", "update/tokens_per_second", "sync/seconds"):
        assert reporter.kept[name] > 0
    steps = json.loads((last_out(tmp_path) / "history.json").read_text())["steps"]
    assert "r3/router_mismatch" not in steps[0]
    assert result["max_refresh_difference"] <= 1e-4
    assert not (last_out(tmp_path) / "experts.json").exists()


@pytest.mark.slow
def test_bfloat16_rollouts_are_trained_on_with_their_own_routing(source, tmp_path):
    run(source, tmp_path, SilentReporter(), rollout_dtype="bfloat16", steps=1)
    (row,) = json.loads((last_out(tmp_path) / "history.json").read_text())["steps"]
    assert row["r3/used_mismatch"] == 0
    assert 1e-7 < row["r3/k3_kl"] < 1e-2


@pytest.mark.slow
def test_an_engine_that_dies_is_replaced_once_and_nothing_changes(source, undisturbed, tmp_path):
    DyingEngine.left, DyingEngine.asked = 1, 0
    result = run(source, tmp_path, SilentReporter(), engine=DyingEngine)
    assert result["engine_restarts"] == 1
    assert undisturbed[0]["engine_restarts"] == 0
    assert digests(last_out(tmp_path)) == digests(undisturbed[1])


@pytest.mark.slow
def test_an_engine_that_dies_again_ends_the_run(source, tmp_path):
    DyingEngine.left, DyingEngine.asked = 2, 0
    with pytest.raises(LostWorkerError, match="died"):
        run(source, tmp_path, SilentReporter(), engine=DyingEngine)


@pytest.mark.slow
def test_stale_rollouts_come_from_the_policy_that_they_should_and_a_resumed_run_has_the_same(source, tmp_path):
    fields: dict[str, Any] = {"max_staleness": 1, "correction": Correction(), "steps": 3}
    run(source, tmp_path / "whole", SilentReporter(), **fields)
    whole = last_out(tmp_path / "whole")
    records = [read_record(path).provenance for path in sorted((whole / "rollouts").iterdir())]
    assert [(record.step, record.policy_version) for record in records] == [(1, 0), (2, 0), (3, 1)]
    with pytest.raises(InterruptedRunError):
        run(source, tmp_path / "cut", InterruptingReporter(1), **fields)
    run(source, tmp_path / "cut", SilentReporter(), **fields)
    assert digests(last_out(tmp_path / "cut")) == digests(whole)
    steps = json.loads((whole / "history.json").read_text())["steps"]
    assert [row["staleness"] for row in steps] == [0, 1, 1]
    assert steps[1]["r3/k3_kl"] > 1e-6 > steps[1]["sync/k3_kl"]


@pytest.mark.slow
def test_an_update_is_replayed_from_disk_bit_for_bit(source, tmp_path):
    """The first step, from nothing but the model it began with and the record of its rollouts."""
    settings = config(steps=1, mini_steps=2)
    run(source, tmp_path, SilentReporter(), steps=1, mini_steps=2)
    model = load_model(source, dtype=torch.float32)
    optimizer, schedule = build_optimizer(model, settings.optimizer, 2)
    learner = Learner(model, optimizer, schedule, settings, "r3")
    record = read_record(next((last_out(tmp_path) / "rollouts").iterdir()))
    threads = torch.get_num_threads()
    with deterministic():
        prepared, _ = prepare(learner, as_batch(settings, record))
        update(learner, prepared, step=1)
    assert threads == torch.get_num_threads()
    trained = load_model(last_out(tmp_path), dtype=torch.float32)
    for (name, ours), theirs in zip(model.named_parameters(), trained.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


REWARD = """
def parity(completion_ids, **columns):
    return [sum(i % 2 for i in ids) / len(ids) for ids in completion_ids]
"""


@pytest.mark.slow
def test_other_algorithms_train_on_a_users_reward(source, tmp_path):
    (tmp_path / "reward.py").write_text(REWARD)
    reward = FunctionReward(path=f"{tmp_path / 'reward.py'}:parity")
    for algorithm in (Gspo(), Cispo()):
        base = tmp_path / algorithm.type
        fields: dict[str, Any] = {"algorithm": algorithm, "rewards": (reward,), "kl": KlPenalty(), "routing": "auto"}
        result = run(source, base, SilentReporter(), steps=1, mini_steps=8, **fields)
        history = json.loads((last_out(base) / "history.json").read_text())
        assert result["routing"] == history["routing"]["mode"] == "r3"
        assert "8 optimiser steps" in history["routing"]["reason"]
        (row,) = history["steps"]
        assert row["rewards/parity/mean"] == pytest.approx(row["reward"])
        assert row["kl"] > 0
        assert row["r3/used_mismatch"] == 0


def test_answers_that_do_not_fit_are_refused_before_an_engine_starts(source, tmp_path):
    task = TaskConfig(name="chain_sum", arguments={"max_terms": 2, "min_digits": 6, "max_digits": 6})
    with pytest.raises(InputError, match=r"answers of task 'chain_sum' are longer than rl\.max_tokens 3"):
        run(source, tmp_path, SilentReporter(), engine=no_engine, task=task, max_tokens=3)


def test_a_tokenizer_of_another_model_is_refused_before_an_engine_starts(source, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(source, other)
    train_bpe(["Question: what is 1 + 2 =\nAnswer: 3\n" * 50, "Calculate the sum. " * 50], 400).save_pretrained(other)
    with pytest.raises(InputError, match="its model has only 288"):
        run(other, tmp_path, SilentReporter(), engine=no_engine)
