"""Runs of r3-training that fail: what they did before counts, nothing is invented, and they are not run again."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from moestro.config import OptimizerConfig, RlConfig, TaskConfig
from moestro.errors import ResourceError
from moestro.training.optimizer import build_optimizer
from moestro.training.state import save_state
from moestro_services.replay import training
from moestro_services.replay.drawing import draw_rewards

CONFIG = RlConfig(task=TaskConfig(name="chain_sum"), steps=4)
ROWS = [{"reward": 0.25, "r3/k3_kl": 1e-3}, {"reward": 0.75, "r3/k3_kl": 3e-3}]


class FailingStage:
    """Stands for `moestro stage rl`: keeps `rows` of its history as the stage does, and fails."""

    def __init__(self, rows: list[dict[str, float]], said: str = "loss nan is not finite") -> None:
        self.rows, self.said, self.calls = rows, said, 0

    def __call__(self, command: list[str], **_fields: Any) -> Any:
        self.calls += 1
        out = Path(command[command.index("--out") + 1])
        scratch = out.parent / f".{out.name}.moestro" / "work" / "rl" / "0123.1" / "scratch"
        scratch.mkdir(parents=True)
        model = nn.Linear(2, 2)
        optimizer, schedule = build_optimizer(model, OptimizerConfig(), 4)  # type: ignore[arg-type,unused-ignore]
        for step in range(1, len(self.rows) + 1):
            extra = {"steps": self.rows[:step]}
            save_state(
                scratch / "state", step, model=model, optimizer=optimizer, schedule=schedule, owner="", extra=extra
            )
        return subprocess.CompletedProcess(command, 2, stdout=self.said, stderr="")


@pytest.fixture
def compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(training, "ARMS", {"off": {"routing": "off"}})
    monkeypatch.setattr(training, "MINI_STEPS", (1,))

    def run(stage: FailingStage) -> training.Run:
        monkeypatch.setattr(training.subprocess, "run", stage)
        ((found,),) = training.compare(CONFIG, tmp_path / "model", tmp_path / "bench", (0,)).values()
        return found

    return run


def test_updates_before_the_failure_count_and_it_is_not_run_again(compare: Any, tmp_path: Path) -> None:
    stage = FailingStage(ROWS)
    found = compare(stage)
    assert found == training.Run([0.25, 0.75], 2e-3, failed=True)
    assert found.collapsed
    assert compare(stage) == found
    assert stage.calls == 1
    assert not list((tmp_path / "bench").glob(".*.moestro"))


def test_a_run_without_an_update_is_in_no_mean(compare: Any, tmp_path: Path) -> None:
    failed, good = compare(FailingStage([])), training.Run([0.5, 0.5, 0.5, 0.75, 0.75, 0.75], 1e-3, failed=False)
    (row,) = training.report({("off", 1): [failed, good]}, [])["rows"]
    assert row == ["off", 1, "0.500", "0.750", "0.250", "1.0e-03", "1 of 2"]
    (row,) = training.report({("off", 1): [failed]}, [])["rows"]
    assert row == ["off", 1, "none", "none", "none", "none", "1 of 1"]
    draw_rewards({"off": [failed.rewards, good.rewards], "none": [failed.rewards]}, tmp_path / "rewards.svg")


def test_another_failure_is_no_collapse_and_is_tried_again(compare: Any) -> None:
    with pytest.raises(ResourceError, match="no space"):
        compare(FailingStage([], said="no space left"))
