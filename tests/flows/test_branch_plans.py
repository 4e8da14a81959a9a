"""What a plan of branches makes run: which steps read which text, and what a domain more runs again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from moestro.artifacts import ArtifactStore
from moestro.config import Config, LifecycleConfig, validate
from moestro.errors import InputError
from moestro_flows.lifecycle import walk
from moestro_flows.plan import Plan

Running = Callable[[LifecycleConfig, LifecycleConfig], set[str]]
TINY = Path(__file__).parents[1] / "e2e" / "tiny.yaml"
PROSE = {"name": "prose", "source": {"type": "builtin", "name": "docs", "max_bytes": 100_000}}
AFTER_MIX = {"mix", "tune", "rl", "compress", "deploy"}
WHOLE = {"code", "math"}


def tiny(*domains: dict[str, Any], seed: dict[str, Any] | None = None, **branch: Any) -> LifecycleConfig:
    """The tiny lifecycle with further domains, and other fields of seed and branch."""
    data = yaml.safe_load(TINY.read_text())
    data["data"]["domains"] += domains
    data["seed"] |= seed or {}
    data["branch"] |= branch
    return validate(LifecycleConfig, data, where="test")


def inputs(config: LifecycleConfig) -> dict[str, dict[str, Any]]:
    """What every step of the walk is handed; names stand for artifacts."""
    found: dict[str, dict[str, Any]] = {}

    def run(name: str, stage: str, stage_config: Config, **given: Any) -> str:
        found[name] = given
        return name

    walk(config, run)
    return found


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


@pytest.fixture
def running(store: ArtifactStore, publish_all: Callable[[LifecycleConfig, ArtifactStore], None]) -> Running:
    """Steps of the second lifecycle that would run once the first is done, without those that measure."""

    def run(before: LifecycleConfig, after: LifecycleConfig) -> set[str]:
        publish_all(before, store)
        steps = {step.name for step in Plan.of(after, store).steps if step.action == "run"}
        return {name for name in steps if not name.startswith(("evaluate", "profile"))}

    return run


def reason(config: LifecycleConfig, store: ArtifactStore, name: str) -> str:
    return next(step.reason for step in Plan.of(config, store).steps if step.name == name)


def test_a_new_domain_runs_its_own_steps_and_the_mix_alone(running: Running) -> None:
    after = tiny(PROSE, seed={"domains": ["math", "code"]})
    assert running(tiny(), after) == {"corpus prose", "tokens prose", "branch prose"} | AFTER_MIX


def test_a_new_domain_without_named_ones_makes_another_seed(running: Running) -> None:
    assert {"seed", "tokens code", "branch code"} <= running(tiny(), tiny(PROSE))


def test_a_branch_reads_other_domains_only_for_its_general_share() -> None:
    assert inputs(tiny())["branch code"]["general"] == {}
    general = PROSE | {"role": "general"}
    steps = inputs(tiny(general, general_share=0.2, overrides={"math": {"general_share": 0.0}}))
    assert steps["branch code"]["general"] == {"prose": "tokens prose"}
    assert steps["branch math"]["general"] == {}
    assert inputs(tiny(general_share=0.2))["branch code"]["general"] == {"math": "tokens math"}


def test_general_text_is_tuned_on_and_measured_but_not_mixed() -> None:
    steps = inputs(tiny(PROSE | {"role": "general"}, general_share=0.2))
    assert "branch prose" not in steps
    assert steps["mix"]["branches"].keys() == steps["mix"]["tokens"].keys() == WHOLE
    for name in ("tune", "compress", "evaluate mix", "profile mix", "evaluate branch code", "deploy"):
        assert steps[name]["tokens"].keys() == WHOLE | {"prose"}
    assert steps["seed"]["corpora"].keys() == WHOLE | {"prose"}


def test_a_share_for_one_branch_runs_that_branch_alone(running: Running, store: ArtifactStore) -> None:
    after = tiny(overrides={"math": {"general_share": 0.2}})
    assert running(tiny(), after) == {"branch math"} | AFTER_MIX
    assert reason(after, store, "branch math") == "general_share: 0.0 -> 0.2"


def test_a_plan_says_what_every_branch_trains(store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    longer = {"tokens": 1_000_000, "early_stopping": {}}
    config = tiny(
        PROSE,
        existing={"math": {"path": str(tmp_path)}},
        general_share=0.05,
        overrides={"prose": {"training": longer, "trainable": "all", "general_share": 0.0}},
    )
    work = {step.name: step.work for step in Plan.of(config, store).steps if step.work}
    assert work == {
        "seed": "10,240 tokens in 20 steps",
        "branch code": "20,480 tokens in 40 steps, ffn, 0.05 general text",
        "branch math": "imported",
        "branch prose": "1,000,000 tokens, all, or earlier",
        "tune": "20,480 tokens in 40 steps, all",
    }


def test_a_role_changes_no_corpus_and_no_tokens(running: Running) -> None:
    assert running(tiny(PROSE), tiny(PROSE | {"role": "general"})) == AFTER_MIX


def test_a_branch_that_exists_reads_its_files_and_no_text(
    running: Running, store: ArtifactStore, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text('{"model_type": "llama"}')
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    after = tiny(existing={"math": {"path": str(checkpoint)}})
    assert "tokens" not in inputs(after)["branch math"]
    assert running(tiny(), after) == {"branch math"} | AFTER_MIX
    assert running(after, after) == set()
    (checkpoint / "model.safetensors").write_bytes(b"others")
    assert reason(after, store, "branch math") == "source/checkpoint has other contents"
    (checkpoint / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json is missing"):
        Plan.of(after, store)
