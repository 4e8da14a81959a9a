"""A candidate against the champion: every relative bound, what is not comparable, and that noise does not refuse."""

import copy
import json
import math
import random
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.config import DeployConfig, LatencyGate, MemoryGate, QualityGate
from moestro.deployment.comparison import refusals
from moestro.deployment.paired import smallest_drop

Json = dict[str, Any]
RIGHT = "1101" * 32
PATHS = [
    ("gates",),
    ("gates", "quality"),
    ("gates", "quality", "figures"),
    ("gates", "quality", "figures", "held_out_loss"),
    ("gates", "quality", "evidence", "text"),
    ("gates", "quality", "evidence", "text", "code"),
    ("gates", "quality", "evidence", "task", "problems"),
    ("gates", "quality", "evidence", "task", "right"),
    ("gates", "latency", "thresholds"),
    ("gates", "memory", "figures", "weights_bytes"),
]
"""What, taken from the champion, leaves something that cannot be compared."""


def deployment(**config: Any) -> Json:
    """A `deployment.json` as the stage writes it."""
    chosen = DeployConfig(**config)
    gates: Json = {
        name: {"figures": {}, "thresholds": getattr(chosen, name).model_dump(mode="json"), "evidence": {}}
        for name in ("parity", "quality", "routing", "latency", "memory")
    }
    gates["quality"]["figures"] = {"held_out_loss": {"code": 2.0, "math": 1.0}, "task_accuracy": 0.75}
    gates["quality"]["evidence"] = {
        "text": {"code": "c0de", "math": "0123"},
        "task": {"name": "chain_sum", "problems": "5ums", "right": RIGHT},
    }
    gates["memory"]["figures"] = {"weights_bytes": 2**30}
    return json.loads(json.dumps({"name": "assistant", "gates": gates, "forced": chosen.force}))


def result(**fields: Any) -> Json:
    figures = {"first_token_seconds": 0.1, "per_token_seconds": 0.02, "peak_memory_bytes": 2**31}
    return figures | {"machine": "x86_64, 2 cores"} | fields


def compare(candidate: Json, champion: Json | None = None, **fields: Any) -> list[str]:
    champion = deployment() if champion is None else champion
    return refusals(candidate, champion, result=result(**fields), champion_result=result())


def quality(content: Json, **losses: float | None) -> Json:
    changed = copy.deepcopy(content)
    changed["gates"]["quality"]["figures"]["held_out_loss"] |= losses
    return changed


def task(content: Json, **fields: Any) -> Json:
    changed = copy.deepcopy(content)
    changed["gates"]["quality"]["evidence"]["task"] |= fields
    return changed


def without(content: Json, path: tuple[str, ...]) -> Json:
    changed = copy.deepcopy(content)
    place = changed
    for name in path[:-1]:
        place = place[name]
    del place[path[-1]]
    return changed


def test_a_deployment_may_take_its_own_place() -> None:
    assert compare(deployment()) == []


def test_a_loss_that_rose_is_refused_with_figure_and_threshold() -> None:
    assert compare(quality(deployment(), code=2.05, math=0.1)) == []
    assert compare(quality(deployment(), code=2.25)) == [
        "the held-out loss of code rose by 0.25 nats per token from the champion's 2 to 2.25 (at most 0.05 is allowed)"
    ]


@given(increase=st.floats(-3, 3), bound=st.floats(0, 2))
def test_a_loss_may_rise_by_the_bound_and_no_more(increase: float, bound: float) -> None:
    candidate = quality(deployment(quality=QualityGate(max_loss_increase=bound)), code=2.0 + increase)
    assert len(compare(candidate)) == ((2.0 + increase) - 2.0 > bound)


@pytest.mark.parametrize("figure", [None, math.nan, math.inf, "2.0", True])
def test_a_figure_that_is_no_number_is_refused_on_either_side(figure: Any) -> None:
    broken = quality(deployment(), code=figure)
    assert compare(broken) == ["the held-out loss of code is not comparable: the candidate has no figure"]
    assert compare(deployment(), broken) == ["the held-out loss of code is not comparable: the champion has no figure"]
    assert compare(deployment(), first_token_seconds=figure) == [
        "the median time to the first token is not comparable: the candidate has no figure"
    ]
    assert compare(deployment(), peak_memory_bytes=figure) == [
        "the peak of resident memory is not comparable: the candidate has no figure"
    ]


def test_other_text_is_not_compared_and_a_domain_that_is_missing_is_missed() -> None:
    other = deployment()
    other["gates"]["quality"]["evidence"]["text"]["code"] = "abcd"
    assert compare(other) == [
        "the held-out loss of code is not comparable: it was measured on other text than the champion's"
    ]
    fewer = without(deployment(), ("gates", "quality", "figures", "held_out_loss", "math"))
    assert compare(fewer) == ["the held-out loss of math is not comparable: the candidate has no figure"]


def test_what_the_candidate_alone_was_measured_on_has_nothing_to_fall_behind() -> None:
    more = quality(deployment(), law=9.0)
    more["gates"]["quality"]["evidence"]["text"]["law"] = "1aw"
    assert compare(more) == []
    champion = deployment()
    champion["gates"]["quality"]["evidence"]["task"] = None
    assert compare(deployment(), champion) == []


def test_accuracy_that_fell_for_sure_is_refused_and_noise_is_not() -> None:
    a_few_lost = task(deployment(), right="0000" + RIGHT[4:])
    assert compare(a_few_lost) == []
    (words,) = compare(task(deployment(), right="0" * 64 + RIGHT[64:]))
    assert words == (
        "accuracy at chain_sum fell from the champion's 0.75 to 0.375 over 128 problems, by at least 0.298 at 95% "
        "confidence (at most 0.02 is allowed)"
    )
    assert compare(task(deployment(), right="1" * 128)) == []


@pytest.mark.parametrize(
    ("evidence", "words"),
    [
        ({"problems": "others"}, "answered other problems than the champion"),
        ({"problems": None}, "answered other problems than the champion"),
        ({"right": ""}, "not all answers are recorded"),
        ({"right": RIGHT[1:]}, "not all answers are recorded"),
    ],
)
def test_other_problems_are_not_compared(evidence: Json, words: str) -> None:
    assert [
        item.rpartition(": ")[2].removeprefix("the candidate ") for item in compare(task(deployment(), **evidence))
    ] == [words]


def test_a_candidate_without_a_task_is_not_comparable() -> None:
    candidate = deployment()
    candidate["gates"]["quality"]["evidence"]["task"] = None
    assert compare(candidate) == ["accuracy at chain_sum is not comparable: the candidate was measured on no task"]


def test_times_are_refused_where_ratio_and_difference_are_large() -> None:
    gate = LatencyGate(max_ratio=2.0, negligible_first_token_seconds=0.5, negligible_per_token_seconds=0.01)
    candidate = deployment(latency=gate)
    assert compare(candidate, first_token_seconds=0.59, per_token_seconds=0.04) == []
    first, later = compare(candidate, first_token_seconds=0.7, per_token_seconds=0.05)
    assert first == (
        "the median time to the first token is 7 times the champion's: 0.7 s against 0.1 s (at most 2 times is allowed)"
    )
    assert "of each later token is 2.5 times" in later


def test_times_of_another_machine_or_other_requests_are_not_compared() -> None:
    assert compare(deployment(), machine="aarch64, 64 cores") == [
        "latency is not comparable: it was measured on aarch64, 64 cores, the champion's on x86_64, 2 cores",
        "the peak of resident memory is not comparable: it was measured on aarch64, 64 cores, the champion's on "
        "x86_64, 2 cores",
    ]
    assert (
        compare(deployment(), machine=None)[0] == "latency is not comparable: the candidate's record names no machine"
    )
    (words,) = compare(deployment(latency=LatencyGate(prompt_tokens=64)))
    assert words.startswith("latency is not comparable: the champion was asked with other prompts")
    more = deployment(latency=LatencyGate(requests=50))  # a better measurement of the same
    assert compare(more) == []


def test_memory_that_grew_is_refused() -> None:
    candidate = deployment()
    candidate["gates"]["memory"]["figures"]["weights_bytes"] = 2 * 2**30
    weights, peak = compare(candidate, peak_memory_bytes=4 * 2**30)
    assert weights == (
        "the size of the weights is 2 times the champion's: 2 GiB against 1 GiB (at most 1.5 times is allowed)"
    )
    assert peak.startswith("the peak of resident memory is 2 times the champion's: 4 GiB against 2 GiB")
    (words,) = compare(deployment(), peak_memory_bytes=2**40)
    assert "512 times" in words


def test_bounds_can_be_left_out() -> None:
    unbounded = deployment(
        quality=QualityGate(max_loss_increase=None, max_accuracy_drop=None),
        latency=LatencyGate(max_ratio=None),
        memory=MemoryGate(max_ratio=None),
    )
    assert refusals(unbounded, {}, result={}, champion_result={}) == []


def test_a_champion_without_gates_is_compared_with_nothing_silently() -> None:
    found = refusals(deployment(), {"name": "old", "gate": {}}, result=result(), champion_result={})
    assert found == [
        "held-out loss is not comparable: the champion has no figures of it",
        "latency is not comparable: the champion's record names no machine",
        "the size of the weights is not comparable: the champion has no figure",
        "the peak of resident memory is not comparable: the champion's record names no machine",
    ]


def test_a_candidate_without_gates_is_refused() -> None:
    found = refusals({}, deployment(), result={}, champion_result=result())
    assert len(found) == 4
    assert all("not comparable: the candidate was deployed without the threshold" in words for words in found)


@pytest.mark.parametrize("path", PATHS, ids="/".join)
def test_whatever_the_champion_lacks_is_told(path: tuple[str, ...]) -> None:
    found = compare(deployment(), without(deployment(), path))
    assert found
    assert all("not comparable" in words for words in found)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(path=st.sampled_from(PATHS), value=JSON, side=st.booleans())
def test_nothing_is_raised_whatever_stands_in_a_file(path: tuple[str, ...], value: Any, side: bool) -> None:
    strange = copy.deepcopy(deployment())
    place = strange
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    pair = (strange, deployment()) if side else (deployment(), strange)
    assert all(isinstance(words, str) for words in compare(*pair))


@given(st.text("01", min_size=1, max_size=300))
def test_the_same_answers_are_never_a_drop(answers: str) -> None:
    assert -1 <= smallest_drop(answers, answers) < 0


@given(st.lists(st.sampled_from([("0", "0"), ("0", "1"), ("1", "0"), ("1", "1")]), min_size=1, max_size=200))
def test_the_limit_lies_below_the_drop_itself(pairs: list[tuple[str, str]]) -> None:
    champion, candidate = ("".join(side) for side in zip(*pairs, strict=True))
    drop = (champion.count("1") - candidate.count("1")) / len(pairs)
    assert smallest_drop(champion, candidate) < max(drop, 0) + 1e-12


def test_the_limit_is_agresti_and_mins() -> None:
    """By hand: b = 20, c = 5, n = 100; d = 15/102, s = sqrt(26 - 225/102)/102."""
    champion, candidate = "1" * 20 + "0" * 5 + "1" * 75, "0" * 20 + "1" * 5 + "1" * 75
    expected = 15 / 102 - 1.6448536269514722 * math.sqrt(26 - 225 / 102) / 102
    assert smallest_drop(champion, candidate) == pytest.approx(expected)
    assert smallest_drop("1" * 9, "0" * 9) < 1
    for pair in (("", ""), ("1", "11")):
        with pytest.raises(ValueError, match="cannot be paired"):
            smallest_drop(*pair)


def test_noise_refuses_about_one_in_twenty_at_a_bound_of_zero() -> None:
    """Two models, equally good, that err independently of each other."""
    draw = random.Random(0)
    rounds, refused = 2000, 0
    for _ in range(rounds):
        sides = ["".join("1" if draw.random() < 0.6 else "0" for _ in range(128)) for _ in range(2)]
        refused += smallest_drop(*sides) > 0
    assert 0.03 < refused / rounds < 0.065


def test_comparing_loads_no_torch() -> None:
    code = "import sys, moestro.deployment.comparison; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
