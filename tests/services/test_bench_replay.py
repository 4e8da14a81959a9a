"""The benches of routing replay at toy size: real vLLM, a tiny model, every figure there."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from moestro.config import RlConfig, TaskConfig
from moestro.data.tokenizer import train_bpe
from moestro.models.checkpoint import save_model
from moestro_kernels.timing import Timing
from moestro_services.replay import cost, parity, training
from moestro_services.replay.accuracy import Gain
from moestro_services.replay.batches import sample, task_prompts
from moestro_services.replay.drawing import draw_rewards
from moestro_services.replay.models import write_fragile

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
TASK = TaskConfig(name="chain_sum", arguments={"max_terms": 2, "max_digits": 2})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe")
    train_bpe(["Question: What is 1 + 2?\nAnswer: 3\n"] * 3, 288).save_pretrained(folder)
    torch.manual_seed(0)
    shape = MixtralConfig(
        vocab_size=288,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=160,
        initializer_range=0.12,
        num_local_experts=4,
        num_experts_per_tok=2,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    save_model(MixtralForCausalLM(shape), folder, tokenizer_from=folder, origins=[["seed"] * 4] * 2)
    return folder


def test_replay_is_exact_and_a_row_off_is_refused(source: Path, tmp_path: Path) -> None:
    write_fragile(tmp_path / "fragile", source, seed=0)
    prompts = task_prompts(source, TASK, 6)
    found = [
        parity.measure(parity.QUICKSTART, source, prompts, "float32", 0),
        parity.measure(parity.FRAGILE, tmp_path / "fragile", prompts, "bfloat16", 0),
    ]
    for one in found:
        assert one.recompute_mismatch == one.update_mismatch == 0
        assert one.complete == 1
        assert one.refused
    exact, rough = found
    assert max(exact.off.k3, exact.replayed.k3) <= parity.MAX_FLOAT32_K3
    assert rough.off.k3 > 2 * rough.replayed.k3 > 0
    assert rough.off.router_mismatch > 0.01 > exact.off.router_mismatch
    rows = parity.report(
        [
            replace(one, dtype=kind, model=model)
            for one in found
            for kind in ("bfloat16", "float32")
            for model in parity.MODELS
        ]
    )["rows"]
    assert len(rows) == 18


def test_missing_rows_are_counted(source: Path) -> None:
    sampled = sample(source, task_prompts(source, TASK, 2), dtype="float32", seed=0, completions=2, tokens=4)
    assert sampled.complete == 1
    (first, *others), *rest = sampled.groups
    assert replace(sampled, groups=[[replace(first, routes=first.routes[1:]), *others], *rest]).complete == 0.75


def test_costs_have_their_figures_and_vllms_own_reload_fails_the_check(source: Path, tmp_path: Path) -> None:
    config = RlConfig(
        task=TASK, steps=cost.BATCHES, prompts_per_step=4, num_generations=4, max_tokens=6, micro_batch_size=8
    )
    costs = cost.measure(config, source, tmp_path, rounds=2)
    assert costs.difference <= cost.MAX_DIFFERENCE < costs.control
    assert costs.bytes_per_token == costs.expected_bytes == 4
    found = cost.report(costs)
    assert len(found["rows"]) == 7
    assert all(bound["value"] > 0 for bound in found["bounds"])
    for number in (2, 8):
        other = cost.report(replace(costs, bytes_per_token=number))["bounds"]
        assert not next(bound for bound in other if "bytes" in bound["what"])["ok"]
    slow = cost.report(replace(costs, rollout=costs.rollout | {"bare vLLM": Timing((1e-9, 1e-9))}))["bounds"]
    assert not next(bound for bound in slow if "plain vLLM" in bound["what"])["ok"]


def test_every_side_of_the_costs_samples_the_same_tokens(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[list[int]]] = []
    bare, generate = cost.BareEngine.bare, cost.BareEngine.generate

    def kept_bare(*arguments: Any) -> Any:
        outputs: Any = bare(*arguments)
        asked.append([list(answer.token_ids) for output in outputs for answer in output.outputs])
        return outputs

    def kept_generate(*arguments: Any) -> Any:
        groups = generate(*arguments)
        asked.append([answer.token_ids for group in groups for answer in group])
        return groups

    monkeypatch.setattr(cost.BareEngine, "bare", kept_bare)
    monkeypatch.setattr(cost.BareEngine, "generate", kept_generate)
    config = RlConfig(task=TASK, steps=cost.BATCHES, prompts_per_step=3, num_generations=4, max_tokens=6)
    cost.measure(config, source, tmp_path, rounds=2)
    assert len(asked) >= 7 * cost.BATCHES
    assert all(tokens == asked[number % cost.BATCHES] for number, tokens in enumerate(asked))


def test_arms_are_trained_once_and_compared(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "ARMS", {"R3": {"routing": "r3"}})
    monkeypatch.setattr(training, "MINI_STEPS", (1,))
    monkeypatch.setattr(training, "PROBLEMS", 20)
    config = RlConfig(task=TASK, steps=3, prompts_per_step=4, num_generations=4, max_tokens=6, rollout_dtype="bfloat16")
    found = training.compare(config, source, tmp_path / "bench", seeds=(0,))
    made = sorted(path.name for path in (tmp_path / "bench").iterdir())
    assert training.compare(config, source, tmp_path / "bench", seeds=(0,)) == found
    ((run,),) = found.values()
    assert len(run.rewards) == 3
    assert not run.failed
    assert run.k3 > 0
    # The same run as the arm, hence read and not trained.
    gains = training.before_and_after(config, source, tmp_path / "bench", (0,))
    assert sorted(path.name for path in (tmp_path / "bench").iterdir()) == made
    assert 0 <= gains[0].sampled.before <= 1
    picture = tmp_path / "rewards.svg"
    draw_rewards({f"{arm}, {mini}": [run.rewards for run in runs] for (arm, mini), runs in found.items()}, picture)
    assert picture.read_text().startswith("<?xml")
    assert [row[:2] for row in training.report(found, gains)["rows"]] == [["R3", 1]]


def test_a_gain_within_its_interval_is_none() -> None:
    run = training.Run([0.1, 0.2, 0.3], 0.0, failed=False)
    found = {("off", 1): [run, run]}
    right = [1.0, 0.0] * 50
    small, large = (Gain.of(right, [1.0] * more + right[more:]) for more in (4, 40))
    assert (small.before, small.after, large.after) == (0.5, 0.52, 0.7)
    few, many = training.report(found, [training.Gains(small, small), training.Gains(small, large)])["bounds"]
    assert not few["ok"]
    assert many["ok"]
    assert training.Run([0.3, 0.3, 0.3, 0.1, 0.1, 0.1], 0.0, failed=False).collapsed
