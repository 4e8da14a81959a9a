"""The benches of recipes at toy size: every rival trains for real, on the budget it is said to have."""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

import pytest

from moestro_services.upcycling import bench, losses, pretrained, rivals, specialisation
from moestro_services.upcycling.bench import (
    MODEL,
    Measured,
    full_scale,
    measure,
    on_all_seeds,
    report,
    tell,
    token_folders,
    workshop_here,
)
from moestro_services.upcycling.lab import Workshop
from moestro_services.upcycling.statistics import Interval

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
SMALL = replace(
    full_scale(seed_steps=40),
    branch_steps=12,
    tune_steps=12,
    batch_size=16,
    sequence_length=32,
    held_out_tokens=2048,
)
MIXES = {name: rivals.MIXES[name] for name in (rivals.PUBLISHED, "BTX, TIES", "DivMoE's slices", rivals.RECIPE)}
"""One of each kind."""
EQUAL_FLOPS = {rivals.DENSE, rivals.SPARSE, *MIXES}
STEP = 0.1
"""Budgets are met to whole steps; a step of the smallest budget here is less than this share of it."""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """One for all benches: each goes on from what the others trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOESTRO_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setattr(rivals, "MIXES", MIXES)
        with workshop_here() as made:
            yield made


@pytest.fixture(scope="module")
def measured(workshop: Workshop) -> Measured:
    return measure(lambda: nullcontext(workshop), SMALL, (0,))


def test_every_rival_is_measured_on_every_domain(measured: Measured) -> None:
    assert {name for bound in bench.BOUNDS for name in bound[:2]} <= measured.table.keys()
    for name, outcomes in measured.table.items():
        assert [set(outcome.losses) for outcome in outcomes] == [set(SMALL.domains)], name


def test_random_seeds_differ(workshop: Workshop, measured: Measured) -> None:
    other = on_all_seeds(
        workshop, SMALL, (1,), lambda arms: {rivals.SEED: lambda: arms.outcome(rivals.SEED, arms.seed)}
    )
    assert other[rivals.SEED][0].losses != measured.table[rivals.SEED][0].losses


def test_equal_flops_are_equal(measured: Measured) -> None:
    for name in EQUAL_FLOPS:
        for outcome, published in zip(measured.table[name], measured.table[rivals.PUBLISHED], strict=True):
            assert outcome.flops == pytest.approx(published.flops, rel=STEP), name


def test_the_report_judges_perplexities_seed_by_seed(measured: Measured) -> None:
    found = report(measured)
    assert [row[0] for row in found["rows"]] == list(measured.table)
    assert all(len(row) == len(found["columns"]) for row in found["rows"])
    for bound, (one, other, _) in zip(found["bounds"][1:], bench.BOUNDS, strict=True):
        assert bound["value"] == pytest.approx(measured.table[one][0].perplexity / measured.table[other][0].perplexity)


def test_a_second_run_trains_nothing(
    workshop: Workshop, measured: Measured, capsys: pytest.CaptureFixture[str]
) -> None:
    again = Workshop(workshop.store.root, workshop.cluster, tell)
    assert measure(lambda: nullcontext(again), SMALL, (0,)).table[rivals.RECIPE][0] == measured.table[rivals.RECIPE][0]
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("seed 0")]
    assert told
    assert all(line.endswith(": found") for line in told)


def test_intervals_are_students_and_a_figure_that_is_none_has_none() -> None:
    found = Interval.of([1.0, 2.0, 3.0])
    assert (found.mean, found.half_width) == (2.0, pytest.approx(2.484, abs=1e-3))
    assert str(Interval.of([1.5])) == "1.500"
    assert str(Interval.of([math.nan, math.nan])) == "none"


def test_specialisation_compares_routing_by_layer(workshop: Workshop, measured: Measured) -> None:
    found = on_all_seeds(workshop, SMALL, (0,), specialisation.models)
    layers = MODEL.num_hidden_layers
    assert all(len(routing[0].distances) == layers for routing in found.values())
    assert found[rivals.RECIPE][0].share > 1
    assert len(specialisation.report(found)["rows"]) == len(found)


def test_losses_are_compared_on_one_mixture(
    workshop: Workshop, measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    for known, some in ((losses.SOFTMAX, (losses.NONE, losses.ROMA)), (losses.BIASED, (losses.NONE_BIASED, "bip"))):
        for name in known.keys() - set(some):
            monkeypatch.delitem(known, name)
    found = on_all_seeds(workshop, SMALL, (0,), losses.runs)
    assert found.keys() == losses.SOFTMAX.keys() | losses.BIASED.keys()
    costs = losses.costs(token_folders(workshop, SMALL), SMALL, found)
    assert all(seconds > 0 for seconds in costs.values())
    assert len(losses.report(found, costs)["rows"]) == len(found)


def test_the_shorter_list_judges_by_the_best_branch_of_each_domain(workshop: Workshop, measured: Measured) -> None:
    found = {name: one[0] for name, one in on_all_seeds(workshop, SMALL, (0,), pretrained.shorter_list).items()}
    bounds = {bound["what"]: bound["value"] for bound in pretrained.report(found, measured.steps)["bounds"]}
    assert len(bounds) == 2 * len(SMALL.domains)
    for domain in SMALL.domains:
        best = min(outcome.losses[domain] for rival, outcome in found.items() if rival.startswith("branch "))
        ratio = bounds[f"{domain}: recipe's loss by the best single branch's"]
        assert ratio == pytest.approx(found[rivals.RECIPE].losses[domain] / best)
