"""What configs allow and what of them is identity."""

from typing import Annotated, Any

import numpy as np
import pytest
import torch
from pydantic import Field, ValidationError

from moestro.config import (
    BipBalance,
    BranchConfig,
    BranchesConfig,
    BranchOverride,
    BuiltinSource,
    CompressConfig,
    Config,
    Dare,
    DataConfig,
    DeployConfig,
    DomainConfig,
    ErcLoss,
    EvaluateConfig,
    FileSource,
    ImportSeed,
    LifecycleConfig,
    LossFreeBalance,
    MixConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainSeed,
    Resources,
    RlConfig,
    RomaLoss,
    SplitConfig,
    TrainingConfig,
    TuneConfig,
    ZeroRouter,
    ZLoss,
)
from moestro.config.base import EXECUTION

LONG = TrainingConfig(steps=2, sequence_length=1025)


def domains(*names: str) -> DataConfig:
    return DataConfig(domains=tuple(DomainConfig(name=name, source=BuiltinSource(name="docs")) for name in names))


def override(**training: Any) -> BranchOverride:
    return BranchOverride(training=TrainingConfig(**training))


def lifecycle(**changes: Any) -> LifecycleConfig:
    parts: dict[str, Any] = {
        "name": "small",
        "data": domains("code", "prose"),
        "seed": PretrainSeed(training=TrainingConfig(steps=4)),
        "branch": BranchesConfig(training=TrainingConfig(steps=2)),
    }
    return LifecycleConfig(**(parts | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": domains("code", "code")}, "names must differ"),
        (
            {"branch": BranchesConfig(training=TrainingConfig(steps=2), overrides={"poetry": override(steps=1)})},
            r"no domain named \['poetry'\]",
        ),
        ({"mix": MixConfig(num_experts_per_tok=4)}, "4 of only 3 experts"),
        ({"mix": MixConfig(generalist="none", num_experts_per_tok=3)}, "3 of only 2 experts"),
        ({"compress": CompressConfig(num_experts=4)}, "compress.num_experts"),
        ({"compress": CompressConfig(num_experts=1)}, "compress.num_experts"),
        ({"data": domains("code", "seed")}, "'seed' names an expert of the mix"),
        ({"deploy": DeployConfig(max_model_len=2048)}, "deploy.max_model_len: 2048 is longer"),
        ({"evaluate": EvaluateConfig(sequence_length=2048)}, "evaluate.sequence_length: 2048 is longer"),
        ({"branch": BranchesConfig(training=LONG)}, r"branch\.training\.sequence_length: 1025 is longer"),
        (
            {
                "branch": BranchesConfig(
                    training=TrainingConfig(steps=2), overrides={"code": BranchOverride(training=LONG)}
                )
            },
            r"branch\.overrides\.code\.training\.sequence_length: 1025 is longer",
        ),
        (
            {
                "mix": MixConfig(selection="loss_free"),
                "tune": TuneConfig(training=TrainingConfig(steps=1), losses=(ZLoss(),)),
            },
            "tune.losses: mix.selection is loss_free",
        ),
        (
            {"tune": TuneConfig(training=TrainingConfig(steps=1), losses=(LossFreeBalance(),))},
            "loss_free moves a correction bias, which takes mix.selection: loss_free",
        ),
        (
            {
                "data": domains("code", "prose", "sums"),
                "mix": MixConfig(selection="loss_free", num_groups=2, num_groups_per_tok=1),
                "tune": TuneConfig(training=TrainingConfig(steps=1), losses=(BipBalance(),)),
            },
            "tune.losses: bip balances over all experts, mix.num_groups_per_tok leaves some out",
        ),
        ({"tune": TuneConfig(training=LONG)}, r"tune\.training\.sequence_length: 1025 is longer"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        lifecycle(**changes)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (TrainingConfig, {"steps": 1, "batch_size": 6, "accumulation": 4}, "accumulation: 4 does not divide"),
        (TrainingConfig, {"steps": 10**400}, "steps"),
        (TrainingConfig, {"tokens": 10**400}, "tokens"),
        (TrainingConfig, {"minutes": 1e308}, "less than or equal to 10000000"),
        (OptimizerConfig, {"betas": (0.9, 1.0)}, "less than 1"),
        (ModelConfig, {"hidden_size": 64, "num_attention_heads": 3}, "num_attention_heads: 3 does not divide"),
        (ModelConfig, {"num_attention_heads": 6, "num_key_value_heads": 4}, "num_key_value_heads: 4 does not divide"),
        (ModelConfig, {"num_attention_heads": 64, "num_key_value_heads": 1}, "heads of 3, rotary"),
        (
            RlConfig,
            {"task": {"name": "chain_sum"}, "prompts_per_step": 2, "num_generations": 4, "mini_steps": 9},
            "mini_steps: 9 is more than a step's 8 sequences",
        ),
        (
            PretrainSeed,
            {"model": {"max_position_embeddings": 64}, "training": {"steps": 1, "sequence_length": 128}},
            "training.sequence_length: 128 is longer",
        ),
        (LossFreeBalance, {"update_rate": 1.5}, "less than or equal to 1"),
        (RomaLoss, {"bandwidth": 1e-30}, "greater than or equal to 0.001"),
        (RomaLoss, {"bandwidth": 1e200}, "less than or equal to 1000"),
        (DeployConfig, {"max_model_len": 128}, "deploy.parity.sequence_length must be below"),
    ],
)
def test_a_stage_config_that_cannot_work_is_refused(kind: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        kind(**values)


def seeded() -> list[Any]:
    """All configs with a field that seeds a generator."""
    kinds = [Config]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return [kind for kind in kinds if (field := kind.model_fields.get("seed")) and field.annotation is int]


def test_a_seed_that_no_generator_takes_is_refused_by_every_config() -> None:
    assert {TrainingConfig, RlConfig, ErcLoss, Dare, SplitConfig} <= set(seeded())
    for kind in seeded():
        for seed in (2**63, -1):
            with pytest.raises(ValidationError) as refused:
                kind(seed=seed)
            assert ("seed",) in {error["loc"] for error in refused.value.errors()}, kind


def test_the_largest_seed_is_one_that_generators_take() -> None:
    seed = SplitConfig(seed=2**63 - 1).seed
    torch.Generator().manual_seed(seed)
    np.random.default_rng(seed)


def test_an_imported_seed_may_serve_any_length() -> None:
    assert lifecycle(seed=ImportSeed(path="model"), deploy=DeployConfig(max_model_len=4096)).deploy


def test_configs_never_change() -> None:
    config = MixConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.dtype = "bfloat16"  # type: ignore[misc]


def test_branches_take_the_shared_training_or_their_own() -> None:
    overrides = {"prose": override(steps=9)}
    configs = lifecycle(branch=BranchesConfig(training=TrainingConfig(steps=2), overrides=overrides)).branch_configs()
    steps = {name: branch.training.steps for name, branch in configs.items() if isinstance(branch, BranchConfig)}
    assert steps == {"code": 2, "prose": 9}


def test_identity_is_every_field_but_those_marked_execution() -> None:
    assert FileSource(paths=("here/*.txt",)).identity() == {"type": "files", "format": "auto", "text_field": "text"}
    assert ImportSeed(path="somewhere").identity() == {"type": "import", "dtype": "float32"}


class _Leaf(Config):
    what: int = 1
    where: Annotated[str, EXECUTION] = "here"


class _Tree(Config):
    one: _Leaf = _Leaf()
    many: tuple[_Leaf, ...] = (_Leaf(what=2), _Leaf(what=3))
    named: dict[str, tuple[_Leaf, ...]] = Field(default_factory=lambda: {"a": (_Leaf(what=4),)})
    perhaps: _Leaf | None = None


def test_identity_leaves_execution_out_at_every_depth() -> None:
    assert _Tree().identity() == {
        "one": {"what": 1},
        "many": [{"what": 2}, {"what": 3}],
        "named": {"a": [{"what": 4}]},
        "perhaps": None,
    }


@pytest.mark.parametrize(
    "other",
    [
        {"name": "another"},
        {"resources": Resources(cpus=1, branch_workers=2, max_retries=0)},
        {"branch": BranchesConfig(training=TrainingConfig(steps=2, checkpoint_every=1))},
    ],
)
def test_where_and_how_a_lifecycle_runs_is_not_identity(other: dict[str, Any]) -> None:
    assert lifecycle(**other).identity() == lifecycle().identity()


def test_what_a_lifecycle_computes_is_identity() -> None:
    assert lifecycle(mix=MixConfig(router=ZeroRouter())).identity() != lifecycle().identity()


def test_two_rules_do_not_move_one_bias() -> None:
    with pytest.raises(ValidationError, match="loss_free and bip both move the correction bias; keep one"):
        TuneConfig(training=TrainingConfig(steps=1), losses=(BipBalance(), LossFreeBalance()))


def test_workers_that_cannot_share_a_batch_are_refused() -> None:
    training = TrainingConfig(steps=1, batch_size=12, accumulation=2)
    fits = {"seed": ImportSeed(path="somewhere"), "branch": BranchesConfig(training=training)}
    lifecycle(**fits, resources=Resources(branch_workers=3))
    with pytest.raises(
        ValidationError, match=r"resources.branch_workers: 4 workers cannot share the training of the br"
    ):
        lifecycle(**fits, resources=Resources(branch_workers=4))
