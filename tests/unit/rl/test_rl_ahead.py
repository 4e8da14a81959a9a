"""When the engine is asked: as early as staleness allows, beside the trainer where it can, and the same either way."""

import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from moestro.config import Correction, FunctionReward, RlConfig, TaskConfig
from moestro.data.tasks import Task
from moestro.data.tokenizer import train_bpe
from moestro.errors import InputError, LostWorkerError
from moestro.inference.engine import Completion, EngineConfig
from moestro.rl.ahead import Ahead
from moestro.rl.curriculum import build_curriculum
from moestro.rl.engine import TenaciousEngine, count_restarts
from moestro.rl.records import Writer, find_record, read_record
from moestro.rl.rewards import Judge
from moestro.rl.sampling import Sampled, Sampler

TASK = TaskConfig(name="chain_sum", arguments={"max_terms": 2, "max_digits": 1})
STEPS = 4


@dataclass
class FakeEngine:
    """Answers every prompt with its seed's last digits; waits for `go` before it does. No model is involved."""

    concurrent: bool = True
    go: threading.Event = field(default_factory=threading.Event)
    asked: list[int] = field(default_factory=list)
    dies: int = 0

    def generate(self, prompts, sampling):
        assert self.go.wait(30)
        if self.dies:
            self.dies -= 1
            raise LostWorkerError("The rollout engine died.")
        self.asked.append(sampling.seed)
        answer = Completion([1 + sampling.seed % 7], np.zeros(1, np.float32), None, "stop")
        return [[answer] * sampling.n for _ in prompts]

    def close(self):
        pass


def sampler(folder: Path, staleness: int, **fields) -> Sampler:
    config = RlConfig(
        task=TASK,
        steps=STEPS,
        prompts_per_step=2,
        num_generations=2,
        max_tokens=4,
        max_staleness=staleness,
        correction=Correction() if staleness else None,
        **fields,
    )
    tokenizer = train_bpe(["Question: 1 + 2\nAnswer: 3\n"] * 3, 288)
    task = Task.open(TASK)
    curriculum = build_curriculum(config, task, tokenizer, max_positions=128, vocab_size=288)
    folder.mkdir(exist_ok=True)
    return Sampler(config, curriculum, Judge(config.rewards, task), tokenizer, Writer(folder / "rollouts"), "abc")


def engine(fake: FakeEngine, log: Path = Path("/nowhere")) -> TenaciousEngine:
    return TenaciousEngine(lambda _folder, _config: fake, Path("policy"), EngineConfig(), log=log)


def obtained(asked: Sampler, tenacious: TenaciousEngine, step: int) -> Sampled:
    """Rollouts by the policy that the stage began with, on disk."""
    sampled = asked.obtain(tenacious, step, version=0)
    asked.records.settle()
    return sampled


def versions(folder: Path) -> list[int]:
    found = [find_record(folder / "rollouts", step + 1) for step in range(STEPS)]
    return [read_record(path).provenance.policy_version for path in found if path]


@pytest.mark.parametrize(("staleness", "expected"), [(0, [0, 1, 2, 3]), (1, [0, 0, 1, 2]), (2, [0, 0, 0, 1])])
@pytest.mark.parametrize("concurrent", [True, False])
def test_the_policy_of_each_batch_is_as_old_as_it_should_be(tmp_path, staleness, expected, concurrent):
    fake = FakeEngine(concurrent=concurrent)
    fake.go.set()
    made = sampler(tmp_path, staleness)
    with Ahead(made, engine(fake)) as ahead:
        for step in range(STEPS):
            assert ahead.take(step).record.provenance.step == step + 1
            ahead.settle()
    assert versions(tmp_path) == expected
    assert len(fake.asked) == len(set(fake.asked)) == STEPS
    assert sum(sampled.tokens for sampled in ahead.finished) == STEPS * 4


def test_the_trainer_need_not_wait_for_what_it_will_learn_later(tmp_path):
    fake = FakeEngine()
    fake.go.set()
    made = sampler(tmp_path, 1)
    with Ahead(made, engine(fake)) as ahead:
        made.obtain(engine(fake), 0, version=0)
        made.records.settle()
        fake.go.clear()
        first = ahead.take(0)  # returns although the engine does not answer for the second step
        assert first.record.provenance.step == 1
        assert versions(tmp_path) == [0]
        fake.go.set()
        ahead.settle()
        assert versions(tmp_path) == [0, 0]


def test_what_goes_wrong_beside_the_trainer_is_raised_before_weights_change(tmp_path):
    fake = FakeEngine(dies=0)
    fake.go.set()
    made = sampler(tmp_path, 1)
    made.obtain(engine(fake), 0, version=0)
    fake.dies = 2
    with Ahead(made, engine(fake, tmp_path / "restarts")) as ahead:
        ahead.take(0)
        with pytest.raises(LostWorkerError):
            ahead.settle()


def test_restarts_are_limited_by_question_and_counted_over_all_processes_of_a_run(tmp_path):
    log = tmp_path / "restarts"
    assert count_restarts(log) == 0
    for process in (1, 2):
        fake = FakeEngine()
        fake.go.set()
        asked = sampler(tmp_path / str(process), 0)
        tenacious = engine(fake, log)
        for step in (0, 1):
            fake.dies = 1
            asked.obtain(tenacious, step, version=step)
        assert count_restarts(log) == 2 * process


def test_rollouts_of_a_policy_that_is_gone_are_not_sampled_from_another(tmp_path):
    fake = FakeEngine()
    fake.go.set()
    made = sampler(tmp_path, 1)
    with pytest.raises(InputError, match=r"rollouts of rl step 3 are gone"):
        made.obtain(engine(fake), 2, version=2)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"model": "xyz"}, "model abc and not xyz"),
        ({"staleness": 0}, "policy_version 0 and not 1"),
        ({"seed": 1}, r"seed \d+ and not \d+"),
    ],
)
def test_records_of_another_policy_are_refused(tmp_path, other, words):
    fake = FakeEngine()
    fake.go.set()
    obtained(sampler(tmp_path, 1), engine(fake), 1)
    changed = {"staleness": 1} | other
    model = changed.pop("model", "abc")
    made = replace(sampler(tmp_path, **changed), model=model)
    with pytest.raises(InputError, match=f"holds rollouts of another policy: {words}"):
        made.obtain(engine(fake), 1, version=1)


REWARD = """
from pathlib import Path

def down(completions, **columns):
    if not Path({up!r}).exists():
        raise ConnectionError("the judge is down")
    return [float(number) for number in range(len(completions))]
"""


def test_what_a_reward_failed_on_is_judged_again_and_not_sampled_again(tmp_path):
    (tmp_path / "reward.py").write_text(REWARD.format(up=str(tmp_path / "up")))
    rewards = (FunctionReward(path=f"{tmp_path / 'reward.py'}:down"),)
    fake = FakeEngine()
    fake.go.set()
    with pytest.raises(InputError, match="the judge is down"):
        sampler(tmp_path / "cut", 0, rewards=rewards).obtain(engine(fake), 0, version=0)
    assert len(fake.asked) == 1
    (tmp_path / "up").touch()
    resumed = obtained(sampler(tmp_path / "cut", 0, rewards=rewards), engine(fake), 0)
    assert len(fake.asked) == 1
    assert resumed.seconds is None
    whole = obtained(sampler(tmp_path / "whole", 0, rewards=rewards), engine(fake), 0)
    assert whole.seconds is not None
    names = [find_record(tmp_path / base / "rollouts", 1).name for base in ("cut", "whole")]
    assert names[0] == names[1]  # of which its contents' digest is part
    assert not list((tmp_path / "cut" / "unjudged").iterdir())


def test_what_ships_cannot_fail_and_is_not_kept_twice(tmp_path):
    fake = FakeEngine()
    fake.go.set()
    obtained(sampler(tmp_path, 0), engine(fake), 0)
    assert not (tmp_path / "unjudged").exists()


def test_what_is_being_written_is_answered_from_memory_and_gone_from_it_once_on_disk(tmp_path):
    fake = FakeEngine()
    fake.go.set()
    made = sampler(tmp_path, 0)
    first = made.obtain(engine(fake), 0, version=0)
    assert made.obtain(engine(fake), 0, version=0).record is first.record
    made.records.settle()
    again = made.obtain(engine(fake), 0, version=0)
    assert again.record is not first.record
    assert again.record.groups[0][0].token_ids == first.record.groups[0][0].token_ids
    assert len(fake.asked) == 1


def test_what_cannot_be_written_stops_the_run_before_its_policy_changes(tmp_path):
    fake = FakeEngine()
    fake.go.set()
    (tmp_path / "rollouts").touch()
    with Ahead(sampler(tmp_path, 0), engine(fake)) as ahead:
        ahead.take(0)
        with pytest.raises(FileExistsError):
            ahead.settle()
