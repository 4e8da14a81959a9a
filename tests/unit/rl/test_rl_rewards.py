"""Rewards: what ships, what users write, and everything that can go wrong with theirs."""

import math
import threading
from pathlib import Path

import pytest

from moestro.config import ExactMatchReward, FunctionReward, GradedReward, NumericReward, TaskConfig, VerifiedReward
from moestro.data.rewards import locate
from moestro.data.tasks import Problem, Task
from moestro.errors import ConfigError, InputError
from moestro.rl.rewards import Answered, Judge

USERS = """
import asyncio, math, threading
import numpy, torch

def length(prompts, completions, completion_ids, answer, **columns):
    assert len(prompts) == len(answer) == len(completion_ids) == len(columns["step"])
    return [float(len(ids)) for ids in completion_ids]

async def slow_but_fine(completions, **columns):
    async def one(text):
        await asyncio.sleep(0)
        return None if text == "7" else 1.0
    return await asyncio.gather(*map(one, completions))

def raises(**columns):
    raise ZeroDivisionError("nothing to divide by")

def too_few(completions, **columns):
    return [1.0] * (len(completions) - 1)

def none_at_all(completions, **columns):
    return []

def a_number(completions, **columns):
    return 1.0

def not_a_number(completions, **columns):
    return [math.nan] * len(completions)

def words(completions, **columns):
    return ["good"] * len(completions)

def forgets_to_return(**columns):
    pass

def word(completions, **columns):
    return "x" * len(completions)

def by_number(completions, **columns):
    return dict.fromkeys(range(len(completions)), 1.0)

def one_tensor(**columns):
    return torch.tensor(1.0)

def rows(completions, **columns):
    return torch.ones(len(completions), 2)

def huge(completions, **columns):
    return [10**400] * len(completions)

def beyond_float32(completions, **columns):
    return [1e300] * len(completions)

def an_array(completions, **columns):
    return numpy.arange(len(completions))

def a_tensor(completions, **columns):
    return torch.arange(len(completions))

async def never(**columns):
    await asyncio.get_running_loop().create_future()

async def own_timeout(**columns):
    raise TimeoutError("the judge's server did not answer")

def own_sync_timeout(**columns):
    raise TimeoutError("the judge's server did not answer")

class Awaited:
    async def __call__(self, completions, **columns):
        await asyncio.sleep(0)
        return [1.0] * len(completions)

awaited = Awaited()

def silent(completions, **columns):
    return [None] * len(completions)

def hangs(**columns):
    threading.Event().wait()
"""


@pytest.fixture(scope="module")
def task() -> Task:
    return Task.open(TaskConfig(name="chain_sum", arguments={"max_terms": 2, "max_digits": 1}))


@pytest.fixture
def users(tmp_path: Path) -> Path:
    path = tmp_path / "rewards.py"
    path.write_text(USERS)
    return path


def answered() -> Answered:
    problems = [Problem("Question: 3 + 4 =\nAnswer:", "7", {"answer": "7"})] * 4
    return Answered(problems, ["7", " 7\nand more", "it is 7.0", "8"], [[1], [2, 3], [4], [5]])


def function(users: Path, name: str, **fields) -> FunctionReward:
    return FunctionReward(path=f"{users}:{name}", **fields)


@pytest.mark.parametrize(
    ("reward", "earned"),
    [
        (VerifiedReward(), [1, 1, 0, 0]),
        (ExactMatchReward(), [1, 1, 0, 0]),
        (NumericReward(), [1, 1, 1, 0]),
        (NumericReward(tolerance=0.2), [1, 1, 1, 1]),
    ],
)
def test_what_ships(task, reward, earned):
    verdicts = Judge([reward], task).judge(answered(), step=1, group=2)
    assert verdicts.total_NG.flatten().tolist() == earned
    assert verdicts.total_NG.shape == (2, 2)


def test_partial_credit_is_the_tasks_own(task):
    (graded,) = Judge([GradedReward()], task).judge(answered(), step=1, group=4).total_NG.tolist()
    assert graded[:2] == [1, 1]
    problems, completions = answered().problems, answered().completions
    pairs = zip(problems, completions, strict=True)
    assert graded == pytest.approx([task.score(problem, text) for problem, text in pairs])


def test_a_last_number_is_found_in_words(task):
    problems = [Problem("", "-1,250.5", {})] * 3 + [Problem("", "yes", {})]
    texts = ["first 3, then -1250.5", "none", "1250.5", "yes"]
    found = Judge([NumericReward()], task).judge(Answered(problems, texts, [[]] * 4), step=1, group=4)
    assert found.total_NG[0, :3].tolist() == [1, 0, 0]
    assert math.isnan(found.total_NG[0, 3])


def test_several_are_weighted_and_those_without_a_say_left_out(task, users):
    rewards = [ExactMatchReward(weight=2.0), function(users, "slow_but_fine", weight=0.5), function(users, "length")]
    verdicts = Judge(rewards, task).judge(answered(), step=3, group=4)
    assert Judge(rewards, task).names == ["exact_match", "slow_but_fine", "length"]
    assert verdicts.total_NG.tolist() == [[2 + 1, 2 + 0.5 + 2, 0.5 + 1, 0.5 + 1]]
    assert verdicts.by_function_FNG.shape == (3, 1, 4)
    assert verdicts.failures == 0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raises", r"step 3: reward .*rewards.py:raises raised ZeroDivisionError: nothing to divide by"),
        ("too_few", "too_few returned 3 rewards for 4 completions"),
        ("none_at_all", "none_at_all returned 0 rewards for 4 completions"),
        ("a_number", "a_number returned a float for 4 completions"),
        ("not_a_number", "gave completion 0 nan, which is no finite number"),
        ("words", "gave completion 0 'good', which is no finite number"),
        ("forgets_to_return", "forgets_to_return returned nothing for 4 completions"),
        ("word", "word returned a str for 4 completions"),
        ("by_number", "by_number returned a dict for 4 completions"),
        ("one_tensor", "one_tensor returned a Tensor for 4 completions"),
        ("rows", r"gave completion 0 \[1\.0, 1\.0\], which is no finite number"),
        ("huge", "gave completion 0 1000.*, which is no finite number"),
        ("beyond_float32", r"gave completion 0 1e\+300, which is no finite number of float32"),
    ],
)
def test_what_goes_wrong_is_one_clear_error(task, users, name, words):
    with pytest.raises(InputError, match=words):
        Judge([function(users, name)], task).judge(answered(), step=3, group=4)


@pytest.mark.parametrize("name", ["an_array", "a_tensor"])
def test_arrays_are_lists_too(task, users, name):
    assert Judge([function(users, name)], task).judge(answered(), step=1, group=4).total_NG.tolist() == [[0, 1, 2, 3]]


def test_a_function_that_raised_resumes_unless_it_is_changed(task, users):
    with pytest.raises(InputError, match=r"again and it resumes there; with another file it begins anew"):
        Judge([function(users, "raises")], task).judge(answered(), step=1, group=4)


@pytest.mark.parametrize("name", ["never", "hangs"])
def test_what_takes_too_long_is_not_waited_for(task, users, name):
    before = set(threading.enumerate())
    with pytest.raises(InputError, match=r"took more than 0\.05 s"):
        Judge([function(users, name, timeout_seconds=0.05)], task).judge(answered(), step=1, group=4)
    assert all(thread.daemon for thread in set(threading.enumerate()) - before)


@pytest.mark.parametrize("name", ["raises", "never"])
def test_failures_can_be_passed_over(task, users, name):
    broken = function(users, name, on_failure="none", timeout_seconds=5.0 if name == "raises" else 0.05)
    beside = Judge([broken, ExactMatchReward()], task).judge(answered(), step=1, group=4)
    assert beside.total_NG.tolist() == [[1, 1, 0, 0]]
    assert beside.by_function_FNG[0].isnan().all()
    assert beside.failures == 1


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("raises", r" \(.*:raises raised ZeroDivisionError: nothing .*\)"),
        ("never", r" \(.*took more .*\)"),
        ("silent", ""),
    ],
)
def test_a_batch_that_nobody_judges_stops_the_run(task, users, name, why):
    broken = function(users, name, on_failure="none", timeout_seconds=0.5)
    with pytest.raises(InputError, match=f"step 3: no reward judged any of the 4 completions{why}: there is nothing"):
        Judge([broken], task).judge(answered(), step=3, group=4)


@pytest.mark.parametrize("name", ["own_timeout", "own_sync_timeout"])
def test_a_functions_own_timeout_is_not_taken_for_the_runs(task, users, name):
    with pytest.raises(InputError, match=f"{name} raised TimeoutError: the judge's server did not answer"):
        Judge([function(users, name)], task).judge(answered(), step=1, group=4)


def test_an_object_whose_call_is_async_is_awaited(task, users):
    assert Judge([function(users, "awaited")], task).judge(answered(), step=1, group=4).total_NG.tolist() == [[1] * 4]


def test_a_module_is_found_by_name(task):
    assert locate(FunctionReward(path="json.decoder:scanstring")).name == "decoder.py"
    assert Judge([FunctionReward(path="json:dumps")], task).names == ["dumps"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nowhere.py:f", r"nowhere\.py does not exist"),
        ("no_such_package.inner:f", "no module 'no_such_package'"),
        ("json.nowhere:f", "no module 'json.nowhere'"),
        (".relative:f", r"\.relative cannot be found: ImportError"),
    ],
)
def test_what_is_not_there_is_refused(task, path, words):
    with pytest.raises(ConfigError, match=words):
        Judge([FunctionReward(path=path)], task)


def test_a_function_that_is_not_in_the_file_is_refused_with_those_that_are(task, users):
    with pytest.raises(ConfigError, match=r"no function 'lenght'. It has .*length"):
        Judge([function(users, "lenght")], task)


@pytest.mark.parametrize(
    ("text", "words"), [("def f(:\n", "SyntaxError"), ("1 / 0\n", "ZeroDivisionError"), ("exit(2)\n", "SystemExit: 2")]
)
def test_a_file_that_cannot_be_imported_is_refused(task, tmp_path, text, words):
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(ConfigError, match=f"cannot be imported: {words}"):
        Judge([FunctionReward(path=f"{tmp_path / 'broken.py'}:f")], task)


def test_two_rewards_of_one_name_are_refused(task):
    with pytest.raises(ConfigError, match="named 'exact_match'"):
        Judge([ExactMatchReward(), ExactMatchReward(weight=2.0)], task)
