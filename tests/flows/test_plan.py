"""What `moestro plan` says: which steps run, and which field is to blame."""

from collections.abc import Callable
from pathlib import Path

from moestro.artifacts import ArtifactStore
from moestro.config import BranchOverride, LifecycleConfig, load_lifecycle
from moestro_flows.plan import Plan

PublishAll = Callable[[LifecycleConfig, ArtifactStore], None]
TINY = Path(__file__).parents[1] / "e2e" / "tiny.yaml"


def actions(plan: Plan) -> dict[str, str]:
    return {step.name: step.action for step in plan.steps}


def test_a_fresh_store_runs_everything(tmp_path: Path) -> None:
    plan = Plan.of(load_lifecycle(TINY), ArtifactStore(tmp_path))
    assert set(actions(plan).values()) == {"run"}
    assert plan.steps[0].reason == "never run"


def test_a_finished_lifecycle_reuses_everything_whatever_the_resources(tmp_path: Path, publish_all: PublishAll) -> None:
    config, store = load_lifecycle(TINY), ArtifactStore(tmp_path)
    publish_all(config, store)
    elsewhere = config.model_copy(
        update={"resources": config.resources.model_copy(update={"cpus": 1, "max_retries": 9})}
    )
    assert set(actions(Plan.of(elsewhere, store)).values()) == {"reuse"}


def test_a_changed_field_runs_its_step_and_those_after_it_and_is_named(tmp_path: Path, publish_all: PublishAll) -> None:
    config, store = load_lifecycle(TINY), ArtifactStore(tmp_path)
    publish_all(config, store)
    assert config.rl is not None
    changed = config.model_copy(update={"rl": config.rl.model_copy(update={"steps": 5})})
    plan = Plan.of(changed, store)
    running = [step.name for step in plan.steps if step.action == "run"]
    assert running == ["rl", "evaluate rl", "profile rl", "compress", "evaluate compress", "profile compress", "deploy"]
    reasons = {step.name: step.reason for step in plan.steps}
    assert reasons["rl"] == "steps: 4 -> 5"
    assert reasons["compress"] == "rl will run"


def test_a_changed_branch_leaves_the_other_branch_alone(tmp_path: Path, publish_all: PublishAll) -> None:
    config, store = load_lifecycle(TINY), ArtifactStore(tmp_path)
    publish_all(config, store)
    assert config.branch.training is not None
    shorter = BranchOverride(training=config.branch.training.model_copy(update={"steps": 7}))
    changed = config.model_copy(update={"branch": config.branch.model_copy(update={"overrides": {"math": shorter}})})
    plan = Plan.of(changed, store)
    assert actions(plan)["branch code"] == "reuse"
    assert actions(plan)["branch math"] == "run"
    assert next(step for step in plan.steps if step.name == "branch math").reason == "training.steps: 40 -> 7"
    assert actions(plan)["mix"] == "run"


def test_a_damaged_artifact_is_neither_reused_nor_passed_over(tmp_path: Path, publish_all: PublishAll) -> None:
    config, store = load_lifecycle(TINY), ArtifactStore(tmp_path)
    publish_all(config, store)
    steps = {step.name: step for step in Plan.of(config, store).steps}

    def file(name: str, entry: str) -> Path:
        return store.folder(steps[name].stage, steps[name].fingerprint) / entry

    file("branch code", "what.txt").write_text("longer than it was")
    file("seed", "what.txt").unlink()
    file("mix", "artifact.json").write_text("{")
    file("tune", "artifact.json").unlink()
    file("compress", "stray.txt").touch()
    found = {step.name: step for step in Plan.of(config, store).steps}
    damaged = {name for name, step in found.items() if step.action == "damaged"}
    assert damaged == {"branch code", "seed", "mix", "tune", "compress"}
    assert "what.txt is missing" in found["seed"].reason
    assert "what.txt does not match" in found["branch code"].reason
    assert "not a readable record" in found["mix"].reason
    assert all(str(store.folder(found[name].stage, found[name].fingerprint)) in found[name].reason for name in damaged)
    assert found["branch math"].action == "reuse"
