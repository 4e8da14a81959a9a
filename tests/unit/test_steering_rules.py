"""The formulas of steering against loops over tokens that spell them out, and profiles that contradict themselves."""

import json
import math

import pytest
import torch
from torch import Tensor

from moestro.errors import InputError
from moestro.models.steering_profiles import STEERING, Method, Profile, SteeredCheckpoint
from moestro.models.steering_rules import (
    RULED_OUT,
    boosted,
    check_fits,
    contrast,
    layer_rules,
    shifted,
    suppressed,
    weak_choice,
)

LOGITS = torch.tensor([[2.0, 1.0, 0.5, -1.0], [0.1, 0.2, 3.0, 2.9], [-1.0, 4.0, 0.0, 1.0]])


def router(renormalises: bool):
    def route(logits: Tensor) -> tuple[Tensor, Tensor]:
        probabilities, ids = logits.softmax(-1).topk(2, dim=-1)
        return (probabilities / probabilities.sum(-1, keepdim=True) if renormalises else probabilities), ids

    return route


def profile(method: str = "suppress", layers: tuple[tuple[int, ...], ...] = ((1,), ()), **fields) -> Profile:
    parameters = {
        "suppress": {},
        "boost": {"margin": 0.01},
        "language": {"strength": 0.5, "threshold": 0.2},
        "contrast": {"alpha": 0.1, "beta": 0.5, "weak_rank": 3},
    }[method]
    known = {
        "name": "p",
        "method": method,
        "checkpoint": SteeredCheckpoint(stage="rl", fingerprint="f" * 64),
        "layers": layers,
        "num_experts": 4,
        "top_k": 2,
        "renormalises": True,
        "parameters": parameters,
    }
    return Profile.model_validate(known | fields)


@pytest.mark.parametrize("renormalises", [True, False])
@pytest.mark.parametrize("experts", [[0], [1, 3], [0, 1, 2, 3]])
def test_suppress_takes_gates_away_and_keeps_their_sum(renormalises, experts):
    gates, ids = router(renormalises)(LOGITS)
    steered, same = suppressed(gates, ids, experts)
    assert torch.equal(same, ids)
    for token in range(len(LOGITS)):
        left = [float(gates[token, k]) for k in range(2) if int(ids[token, k]) not in experts]
        for k in range(2):
            out = int(ids[token, k]) in experts
            expected = 0.0 if out else float(gates[token, k]) * float(gates[token].sum()) / sum(left)
            assert float(steered[token, k]) == pytest.approx(expected, abs=1e-6)


def test_suppress_leaves_other_tokens_alone_to_the_bit():
    gates, ids = router(True)(LOGITS)
    steered, _ = suppressed(gates, ids, [3])
    others = ~(ids == 3).any(-1)
    assert others.any()
    assert torch.equal(steered[others], gates[others])


def test_boost_forces_experts_in_just_above_the_largest():
    steered = boosted(LOGITS, [1, 3], 0.01)
    for token in range(len(LOGITS)):
        for expert in range(4):
            expected = max(LOGITS[token].tolist()) + 0.01 if expert in (1, 3) else float(LOGITS[token, expert])
            assert float(steered[token, expert]) == pytest.approx(expected)
    assert torch.equal(router(True)(steered)[1].sort().values, torch.tensor([[1, 3]] * 3))


def test_language_adds_standard_deviations():
    steered = shifted(LOGITS, [2], 0.5)
    for token in range(len(LOGITS)):
        values = LOGITS[token].tolist()
        mean = sum(values) / 4
        deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / 3)
        expected = [value + (0.5 * deviation if expert == 2 else 0.0) for expert, value in enumerate(values)]
        assert steered[token].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("renormalises", [True, False])
@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_the_weak_pass_takes_one_expert_by_its_rank(rank, renormalises):
    gates, ids = weak_choice(LOGITS, router(renormalises), rank, renormalises=renormalises)
    for token in range(len(LOGITS)):
        order = sorted(range(4), key=lambda expert: -float(LOGITS[token, expert]))
        assert int(ids[token, 0]) == order[rank - 1]
        assert len(set(ids[token].tolist())) == 2
        share = 1.0 if renormalises else float(LOGITS[token].softmax(-1)[order[rank - 1]])
        assert gates[token].tolist() == pytest.approx([share, 0.0])


def test_contrast_mixes_logits_and_rules_out_the_improbable():
    strong, weak = torch.tensor([[3.0, 2.0, -1.0]]), torch.tensor([[1.0, 2.5, 9.0]])
    mixed = contrast(strong, weak, 0.1, 0.5)[0].tolist()
    expected = [1.5 * 3.0 - 0.5 * 1.0, 1.5 * 2.0 - 0.5 * 2.5, 1.5 * -1.0 - 0.5 * 9.0 - RULED_OUT]
    assert mixed == pytest.approx(expected)  # exp(-4) < 0.1: the last token is ruled out
    assert float(torch.tensor(mixed).softmax(-1)[2]) == 0.0


def test_layers_without_experts_have_no_rule_but_contrast_acts_on_all():
    assert [rule is None for rule in layer_rules(profile())] == [False, True]
    assert None not in layer_rules(profile("contrast", ((), ())))


def test_a_profile_is_read_as_it_was_written(tmp_path):
    made = profile("boost", ((0, 3), (1,)), gate={"figures": {"code": {"loss": 1.5}}})
    made.write(tmp_path)
    assert Profile.read(tmp_path) == made
    assert json.loads((tmp_path / STEERING).read_text())["method"] == "boost"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": ((4,), ())}, "numbered 0 to 3"),
        ({"layers": ((1, 1), ())}, "named twice"),
        ({"layers": ((), ())}, "must be named"),
        ({"method": "contrast", "layers": ((1,), ())}, "no experts belong"),
        ({"method": "boost", "layers": ((0, 1, 2), ())}, "more than 2"),
        ({"parameters": {"margin": 1.0}}, "suppress has none"),
        (
            {"method": "contrast", "layers": ((),), "parameters": {"alpha": 0.1, "beta": 0.5, "weak_rank": 5}},
            "4 ranks",
        ),
    ],
)
def test_profiles_that_contradict_themselves_are_refused(tmp_path, fields, message):
    method = fields.get("method", "suppress")
    content = profile(method, ((), ()) if method == "contrast" else ((1,), ())).model_dump(mode="json") | fields
    (tmp_path / STEERING).write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        Profile.read(tmp_path)


def test_files_that_hold_no_profile_are_refused(tmp_path):
    with pytest.raises(InputError, match="no steering profile"):
        Profile.read(tmp_path)
    (tmp_path / STEERING).write_text("[")
    with pytest.raises(InputError, match="no steering profile"):
        Profile.read(tmp_path / STEERING)


def test_a_profile_for_another_shape_is_refused():
    check_fits(profile(), layers=2, num_experts=4, top_k=2)
    with pytest.raises(InputError, match="another checkpoint"):
        check_fits(profile(), layers=3, num_experts=4, top_k=2)
    assert Method.SUPPRESS == "suppress"
