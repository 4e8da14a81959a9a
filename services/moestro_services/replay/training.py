"""`moestro bench r3-training`: one task learnt with and without routing replay, near on-policy and far from it.

Every arm is `moestro stage rl` on the quickstart's tuned model, in a process with one thread of its own, as many side
by side as there are cores; rollouts are bfloat16's, where engine and trainer route differently. Runs are kept in the
home's folder `bench/r3-training`: a bench that was stopped goes on.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml

from moestro.artifacts import fingerprint
from moestro.config import Correction, Gspo, RlConfig
from moestro.errors import ResourceError, TrainingError
from moestro.training.state import newest_checkpoint
from moestro_flows.home import Home
from moestro_services.replay.accuracy import Answered, Gain, answered
from moestro_services.replay.drawing import draw_rewards
from moestro_services.replay.models import quickstart
from moestro_services.upcycling.statistics import Interval

SEEDS = (0, 1, 2, 3, 4)
MINI_STEPS = (1, 8)
GSPO = Gspo(clip=0.03, clip_high=0.04)
"""A hundred times the paper's range, for a learning rate that is five hundred times the paper's."""
ARMS: dict[str, dict[str, Any]] = {
    "off": {"routing": "off"},
    "TIS": {"routing": "off", "correction": Correction()},
    "GSPO": {"routing": "off", "algorithm": GSPO},
    "R3": {"routing": "r3"},
    "R3 + GSPO": {"routing": "r3", "algorithm": GSPO},
}
LAST = 3
"""Updates whose mean reward is the final one, and the first."""
PROBLEMS, SAMPLES = 256, 8
"""Held-out problems, and answers sampled to each. The task has 991 of them, whose last ones are no fair sample: where
the generator prefers divisors above 1, what is left over in the end has hardly any."""
GAIN_SEEDS = (0, 1, 2)
"""Random seeds of the quickstart's own rl."""


@dataclass(frozen=True)
class Run:
    """What one arm did from one random seed."""

    rewards: list[float]
    """Mean reward by update; of a run that failed, by those before. None if the first update failed."""
    k3: float
    """Engine against trainer before each update's optimiser steps, mean over updates, nats; NaN without any."""
    failed: bool
    """Whether training stopped for a figure that is not finite."""

    @classmethod
    def of(cls, steps: Sequence[Mapping[str, float]], *, failed: bool) -> "Run":
        """From rows of the stage's history."""
        k3 = fmean(row["r3/k3_kl"] for row in steps) if steps else math.nan
        return cls([row["reward"] for row in steps], k3, failed)

    @property
    def first(self) -> float:
        """Mean reward of the first updates."""
        return fmean(self.rewards[:LAST])

    @property
    def final(self) -> float:
        """Mean reward of the last updates."""
        return fmean(self.rewards[-LAST:])

    @property
    def collapsed(self) -> bool:
        """Failed, or ended below its own beginning."""
        return self.failed or self.final < self.first


Found = Mapping[tuple[str, int], Sequence[Run]]
"""By arm and optimiser steps per batch of rollouts, one per random seed."""


def bench(seeds: Sequence[int] = SEEDS) -> dict[str, Any]:
    """The first run trains, for about half an hour on two cores; a later one reads."""
    lifecycle, tuned, _ = quickstart()
    assert isinstance(lifecycle.rl, RlConfig)
    folder = Home.current().path / "bench" / "r3-training"
    short = lifecycle.rl.model_copy(update={"rollout_dtype": "bfloat16", "steps": 12, "prompts_per_step": 16})
    found = compare(short, tuned.path, folder, seeds)
    gains = before_and_after(lifecycle.rl, tuned.path, folder, GAIN_SEEDS)
    picture = folder / "rewards.svg"
    draw_rewards({f"{arm}, {mini}": [run.rewards for run in runs] for (arm, mini), runs in found.items()}, picture)
    return report(found, gains) | {"picture": str(picture)}


def compare(config: RlConfig, model: Path, folder: Path, seeds: Sequence[int]) -> Found:
    """Every arm from every random seed."""
    wanted = {
        (arm, mini, seed): config.model_copy(update={**fields, "mini_steps": mini, "seed": seed})
        for arm, fields in ARMS.items()
        for mini in MINI_STEPS
        for seed in seeds
    }
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = dict(zip(wanted, pool.map(lambda one: _run(one, model, folder), wanted.values()), strict=True))
    return {(arm, mini): [runs[arm, mini, seed] for seed in seeds] for arm in ARMS for mini in MINI_STEPS}


@dataclass(frozen=True)
class Gains:
    """What the quickstart's own rl adds to its tuned model, from one random seed."""

    greedy: Gain
    """Of the likeliest answer."""
    sampled: Gain
    """Of answers sampled at temperature 1, which is what is trained."""


def before_and_after(config: RlConfig, model: Path, folder: Path, seeds: Sequence[int]) -> list[Gains]:
    """By random seed, the accuracy on held-out problems of the tuned model and of what rl makes of it."""
    configs = [config.model_copy(update={"seed": seed}) for seed in seeds]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        trained = list(pool.map(lambda one: _trained(one, model, folder), configs))

    def ask(one: Path) -> Answered:
        return answered(one, config.task, PROBLEMS, config.max_tokens, samples=SAMPLES)

    before, *after = (ask(one) for one in (model, *trained))
    return [Gains(Gain.of(before.greedy, one.greedy), Gain.of(before.sampled, one.sampled)) for one in after]


def _run(config: RlConfig, model: Path, folder: Path) -> Run:
    try:
        out = _trained(config, model, folder)
    except TrainingError:
        return Run.of(json.loads(_failure(config, model, folder).read_text())["steps"], failed=True)
    return Run.of(json.loads((out / "history.json").read_text())["steps"], failed=False)


def _name(config: RlConfig, model: Path) -> str:
    return fingerprint("r3-training", "1", config.identity(), {"model": str(model.name)})[:16]


def _failure(config: RlConfig, model: Path, folder: Path) -> Path:
    """Where a run that failed says why, and what it did before."""
    return folder / f"{_name(config, model)}.failed.json"


def _trained(config: RlConfig, model: Path, folder: Path) -> Path:
    """The artifact of the rl stage on `model`, from `folder` if it is there.

    Raises `TrainingError` if a figure was not finite, now or when this was first tried, `ResourceError` for any other
    failure.
    """
    name, failure = _name(config, model), _failure(config, model, folder)
    out, yaml_file = folder / name, folder / f"{name}.yaml"
    if out.is_dir():
        return out
    if failure.is_file():
        raise TrainingError(json.loads(failure.read_text())["error"])
    folder.mkdir(parents=True, exist_ok=True)
    yaml_file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = ["stage", "rl", "--config", str(yaml_file), "--input", f"model={model}", "--out", str(out), "--cpus", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "moestro_services.cli", *command, "--json"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        # With --json errors are told on standard output.
        said = done.stderr.strip()[-2000:] + done.stdout.strip()[-2000:]
        error = f"`moestro {' '.join(command)}` ended with code {done.returncode}:\n{said}"
        if "not finite" not in said:
            raise ResourceError(error)
        _keep_failure(failure, error, folder / f".{name}.moestro")
        raise TrainingError(error)
    return out


def _keep_failure(failure: Path, error: str, store: Path) -> None:
    """Write `failure`, with the updates that the stage had kept in `store` when it failed, and remove the store."""
    states = [path for folder in store.glob("work/*/*/scratch/state") if (path := newest_checkpoint(folder, _any))]
    steps = [row for path in states for row in torch.load(path, weights_only=True)["extra"]["steps"]]
    temporary = failure.with_suffix(".tmp")
    temporary.write_text(json.dumps({"error": error, "steps": steps}))
    temporary.rename(failure)
    shutil.rmtree(store, ignore_errors=True)


def _any(_step: int) -> bool:
    return True


def report(found: Found, gains: Sequence[Gains]) -> dict[str, Any]:
    """The table, its bounds and notes."""
    seeds = len(next(iter(found.values())))
    return {
        "title": f"One task with and without routing replay, bfloat16 rollouts, {seeds} random seeds",
        "columns": ["arm", "optimiser steps a batch", "first reward", "final reward", "gain", "k3, nats", "collapsed"],
        "rows": [
            [arm, mini, *_figures(runs), f"{sum(run.collapsed for run in runs)} of {seeds}"]
            for (arm, mini), runs in found.items()
        ],
        "bounds": [
            {
                "what": f"random seed {number}: sampled accuracy after the quickstart's rl ({gain.sampled}), "
                "gain by half its interval",
                "value": gain.sampled.difference / max(gain.sampled.half_width, 1e-12),
                "limit": "> 1",
                "ok": gain.sampled.difference > gain.sampled.half_width,
            }
            for number, gain in enumerate(gains)
        ],
        "notes": [
            f"Reward: share of right sampled answers. First and final: means over {LAST} updates; a run has collapsed "
            "if it stopped for a figure that is not finite, or ended below its beginning. One that stopped counts with "
            "the updates before; one without any is in no mean.",
            "±: half a 95% interval over random seeds (Student's t).",
            f"Accuracy: {PROBLEMS} held-out problems, {SAMPLES} answers each; ± over problems, paired. The same of "
            f"greedy answers: {'; '.join(str(gain.greedy) for gain in gains)}.",
            "GSPO's range is 0.03 to 0.04, a hundred times the paper's: so is the learning rate, and more.",
        ],
    }


def _figures(runs: Sequence[Run]) -> list[str]:
    """First and final reward, gain and k3 of the runs that got as far as an update."""
    there = [run for run in runs if run.rewards]
    if not there:
        return ["none"] * 4
    columns = ([run.first for run in there], [run.final for run in there], [run.final - run.first for run in there])
    return [*(str(Interval.of(values)) for values in columns), f"{fmean(run.k3 for run in there):.1e}"]
