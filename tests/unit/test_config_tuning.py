"""What would fail, or do nothing, only at `tune`, after all branches have trained, is refused at once."""

from typing import Any

import pytest
from pydantic import ValidationError

from moestro.config import LifecycleConfig, TrainingConfig, TuneConfig

LOSSES: list[dict[str, Any]] = [{"type": "domain_supervision"}]
PARTITION: list[dict[str, Any]] = [{"type": "random_partition"}]


def lifecycle(tune: dict[str, Any], mix: dict[str, Any] | None = None) -> LifecycleConfig:
    source = {"type": "builtin", "name": "docs"}
    return LifecycleConfig.model_validate(
        {
            "name": "small",
            "data": {"domains": [{"name": name, "source": source} for name in ("code", "prose")]},
            "seed": {"type": "import", "path": "somewhere"},
            "branch": {"training": {"steps": 2}},
            "mix": mix or {},
            "tune": {"training": {"steps": 2}, **tune},
        }
    )


COPIES = {"experts": {"type": "sparse_upcycling"}, "router": {"type": "random"}}
REDRAWN = {"experts": {"type": "drop_upcycling"}, "router": {"type": "random"}}
BLENDED = {"experts": {"type": "blended"}, "router": {"type": "random"}}


@pytest.mark.parametrize(
    ("tune", "mix", "message"),
    [
        (
            {"frozen_experts": ["nosuch"]},
            {},
            r"tune\.frozen_experts: no expert comes from 'nosuch'; there are experts from code, prose, seed",
        ),
        ({"frozen_experts": ["seed"]}, {"generalist": "none"}, "no expert comes from 'seed'"),
        ({"frozen_experts": ["code"]}, COPIES, "no expert comes from 'code'; there are experts from seed"),
        ({"losses": LOSSES}, COPIES, r"tune\.losses: domain_supervision .*experts come from seed; leave it out"),
        ({"losses": LOSSES}, REDRAWN, "experts come from seed"),
        ({"losses": LOSSES}, BLENDED, "experts come from blend"),
        (
            {"frozen_experts": ["code", "prose", "seed"], "trainable": "experts"},
            {},
            r"tune\.frozen_experts: all experts are frozen, and nothing else trains",
        ),
        (
            {"frozen_experts": ["seed"], "rates": {"routers": 0, "others": 0}},
            COPIES,
            r"tune\.frozen_experts: all experts are frozen, and nothing else trains",
        ),
        (
            {"frozen_experts": ["code", "prose", "seed"], "losses": PARTITION},
            {},
            r"tune\.frozen_experts: random_partition averages what the experts learn",
        ),
        (
            {"trainable": "non_experts", "rates": {"routers": 0, "others": 0}},
            {},
            r"tune\.rates: only shared_experts has a factor above 0, and the mix has no shared expert",
        ),
        (
            {"losses": [{"type": "random_partition", "share": 0.7}]},
            {},
            r"tune\.losses: random_partition's share of 0\.7 draws 3 experts beyond their mean, where 2/3 makes",
        ),
    ],
)
def test_a_tuning_that_does_not_suit_the_mix_is_refused(
    tune: dict[str, Any], mix: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        lifecycle(tune, mix)


@pytest.mark.parametrize(
    ("tune", "mix"),
    [
        ({"frozen_experts": ["code", "seed"], "trainable": "experts"}, {}),
        ({"frozen_experts": ["code", "prose", "seed"]}, {}),
        ({"frozen_experts": ["code", "prose"], "losses": PARTITION}, {}),
        ({"losses": [{"type": "random_partition", "share": 0.6}]}, {}),
        ({"losses": LOSSES}, {}),
        ({"losses": LOSSES}, {"experts": {"type": "divmoe"}}),
        ({"losses": LOSSES}, {"experts": {"type": "drop_upcycling", "of": "branches"}}),
        ({"trainable": "non_experts", "rates": {"routers": 0, "others": 0}}, {"generalist": "shared"}),
    ],
)
def test_one_that_does_is_not(tune: dict[str, Any], mix: dict[str, Any]) -> None:
    assert lifecycle(tune, mix).tune


@pytest.mark.parametrize(
    ("trainable", "rates", "idle"),
    [
        ("router", {"routers": 0}, "routers"),
        ("experts", {"experts": 0}, "experts"),
        ("non_experts", {"shared_experts": 0, "routers": 0, "others": 0}, "shared_experts, routers, others"),
        ("all", dict.fromkeys(("experts", "shared_experts", "routers", "others"), 0), "experts, shared_experts"),
    ],
)
def test_a_tuning_in_which_nothing_trains_is_refused(trainable: Any, rates: dict[str, Any], idle: str) -> None:
    message = f"rates: trainable is {trainable}, and the factor of {idle}.* is 0: nothing would train; raise"
    with pytest.raises(ValidationError, match=message):
        TuneConfig.model_validate({"training": {"steps": 2}, "trainable": trainable, "rates": rates})


@pytest.mark.parametrize("budget", [{"steps": 50}, {"tokens": 50 * 16 * 256}, {"steps": 20}])
def test_early_stopping_that_could_not_stop_anything_is_refused(budget: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"early_stopping\.every: 50 leaves one measurement, at the end of"):
        TrainingConfig.model_validate({**budget, "early_stopping": {}})
    TrainingConfig.model_validate({**budget, "early_stopping": {"every": 10}})


def test_early_stopping_of_a_budget_whose_steps_nobody_knows_is_left_alone() -> None:
    assert TrainingConfig.model_validate({"minutes": 1, "early_stopping": {}}).known_steps is None
    assert TrainingConfig(tokens=50 * 16 * 256 + 1).known_steps == 51


def test_a_warm_up_beyond_a_budget_in_tokens_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"optimizer\.warmup_steps: 3 is more than the run's 2 steps"):
        TrainingConfig.model_validate({"tokens": 2 * 16 * 256, "optimizer": {"warmup_steps": 3}})
