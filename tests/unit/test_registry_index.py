"""What the registry says about a small store: the same after indexing step by step and after a rebuild."""

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from sqlalchemy import select

from moestro.artifacts import Artifact, ArtifactStore, Input, LifecycleRun, Record, StepRun, digest_files
from moestro.errors import ArtifactError, InputError
from moestro.registry import Counts, Deployment, Edge, Registry, TaskResult, connect
from moestro.registry.database import reading
from moestro.registry.tables import Base

START = datetime(2026, 3, 1, 12, tzinfo=timezone(timedelta(hours=2)))
ORIGINS = [["code", "docs", "seed"], ["code", "docs", "seed"]]
COUNTS = {"code": [[9, 1, 2], [8, 2, 2]], "docs": [[0, 5, 3], [1, 7, 0]]}
GATE_MASS = {"code": [[4.5, 0.25, 1.25], [4.0, 1.0, 1.0]], "docs": [[0.0, 2.5, 1.5], [0.5, 3.5, 0.0]]}
GATES = {"parity": {"figures": {"max_logprob_difference": 1e-5}, "thresholds": {"max_logprob_difference": 1e-3}}}


def publish(
    store: ArtifactStore, stage: str, letter: str, inputs: dict[str, Artifact] | None = None, **result: Any
) -> Artifact:
    """Publish an artifact whose fingerprint is `letter` repeated; later letters are younger."""
    identity = letter * 64
    roles = {role: Input(stage=item.stage, fingerprint=item.fingerprint) for role, item in (inputs or {}).items()}
    if stage == "corpus":
        roles["source/code"] = Input(stage="files", fingerprint="9" * 64)
    with store.work(stage, identity) as work:
        write_files(work.out, stage, roles)
        record = Record(
            stage=stage,
            version="1",
            fingerprint=identity,
            inputs=roles,
            config={"betas": (0.9, 0.95)},
            result=result,
            files=digest_files(work.out),
            code_version="0.1.0",
            created_at=START + timedelta(minutes=ord(letter)),
            seconds=1.5,
        )
        return store.publish(work, record)


def write_files(out: Path, stage: str, roles: dict[str, Input]) -> None:
    """What artifacts of a stage hold."""
    if stage in ("mix", "profile"):
        (out / "experts.json").write_text(json.dumps({"origins": ORIGINS}))
    if stage == "evaluate":
        task = {"name": "chain_sum", "problems": 8, "accuracy": 0.25} if roles["model"].stage == "mix" else None
        content = {"held_out_loss": {"code": 2.5, "docs": float("nan")}, "task": task, "samples": []}
        (out / "evaluation.json").write_text(json.dumps(content))
    if stage == "profile":
        tensors = {f"counts/{domain}": np.array(values) for domain, values in COUNTS.items()}
        tensors |= {f"gate_mass/{domain}": np.array(values) for domain, values in GATE_MASS.items()}
        tensors |= {"tokens/code": np.array([6]), "tokens/docs": np.array([4])}
        tensors |= {f"coactivation/{domain}": np.zeros((2, 3, 3), dtype=np.int64) for domain in COUNTS}
        save_file(tensors, out / "routing.safetensors")
    if stage == "deploy":
        checkpoint = {"stage": roles["model"].stage, "fingerprint": roles["model"].fingerprint}
        content = {"name": "assistant", "checkpoint": checkpoint, "dtype": "float32", "max_model_len": 512}
        (out / "deployment.json").write_text(json.dumps(content | {"gates": GATES}))


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    """A lifecycle's artifacts, two domains, fingerprints aaa… to iii…."""
    store = ArtifactStore(tmp_path / "home")
    corpus = publish(store, "corpus", "a")
    seed = publish(store, "seed", "b", {"corpora/code": corpus})
    tokens = publish(store, "tokens", "c", {"corpus": corpus, "seed": seed})
    branch = publish(store, "branch", "d", {"seed": seed, "tokens": tokens}, final_loss=float("nan"))
    mix = publish(store, "mix", "e", {"seed": seed, "branches/code": branch, "tokens/code": tokens})
    measured = {"tokens/code": tokens}
    publish(store, "evaluate", "f", {"model": mix, **measured}, tokens={"code": 100, "docs": 50})
    publish(store, "evaluate", "0", {"model": seed, **measured}, tokens={"code": 100, "docs": 50})
    publish(store, "profile", "1", {"model": mix, **measured})
    publish(store, "deploy", "2", {"model": mix, **measured})
    return store


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Records of a completed and of a failed run; the evaluation of the mix ended before the seed's."""
    folder = tmp_path / "home" / "runs"
    letters = {"seed": "b", "evaluate mix": "f", "branch code": "d", "mix": "e", "evaluate seed": "0"}
    steps = tuple(
        StepRun(
            name=name,
            stage=name.split()[0],
            fingerprint=letter * 64,
            status="completed",
            started_at=START,
            seconds=2.0,
        )
        for name, letter in letters.items()
    )
    first = LifecycleRun(
        id="20260301T100000-aaaa",
        name="small",
        status="completed",
        config={"name": "small"},
        started_at=START,
        steps=steps,
        mlflow_run_id="m1",
    )
    first.write(folder)
    later = {"id": "20260301T110000-bbbb", "status": "failed", "started_at": START + timedelta(hours=1), "steps": ()}
    first.model_copy(update=later).write(folder)
    return folder


@pytest.fixture(params=["sqlite", "postgresql"])
def new_url(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], str]:
    """Makes empty databases."""
    if request.param == "sqlite":
        return lambda name: f"sqlite:///{tmp_path / name}.db"
    make: Callable[[], str] = request.getfixturevalue("new_postgres_database")
    return lambda _name: make()


@pytest.fixture
def registry(new_url: Callable[[str], str], store: ArtifactStore, runs: Path) -> Registry:
    """Everything, rebuilt from the records."""
    registry = connect(new_url("registry"))
    assert registry.rebuild(store, runs) == Counts(artifacts=9, runs=2)
    return registry


def every_row(registry: Registry) -> dict[str, list[str]]:
    """The whole content, table by table."""
    with reading(registry.engine) as connection:
        return {
            table.name: sorted(str(tuple(row)) for row in connection.execute(select(table)))
            for table in Base.metadata.sorted_tables
        }


def test_rebuild_equals_indexing_step_by_step(
    registry: Registry, new_url: Callable[[str], str], store: ArtifactStore, runs: Path
) -> None:
    incremental = connect(new_url("incremental"))
    for folder, record in reversed(list(store.records())):
        incremental.index_artifact(folder, record.model_copy(update={"version": "0"}))
        fresh = {"final_loss": float("nan")} if "final_loss" in record.result else record.result
        incremental.index_artifact(
            folder, record.model_copy(update={"config": {"betas": (0.9, 0.95)}, "result": fresh})
        )
    for path in runs.glob("*.json"):
        run = LifecycleRun.model_validate_json(path.read_bytes())
        incremental.index_run(run.model_copy(update={"status": "running", "steps": run.steps[:1] * 9}))
        incremental.index_run(run)
    rows = every_row(incremental)
    assert rows == every_row(registry)
    assert {name: len(found) for name, found in rows.items()} == {
        "lifecycle_runs": 2,
        "step_runs": 5,
        "artifacts": 9,
        "artifact_inputs": 17,
        "held_out_losses": 4,
        "task_results": 1,
        "experts": 12,
        "expert_statistics": 12,
        "layer_statistics": 4,
        "deployments": 1,
    }


def test_rebuild_forgets_what_has_no_record_any_more(registry: Registry, store: ArtifactStore, runs: Path) -> None:
    shutil.rmtree(store.folder("deploy", "2" * 64))
    assert registry.rebuild(store, runs) == Counts(artifacts=8, runs=2)
    assert registry.deployments() == []


def test_rebuild_over_a_broken_record_changes_nothing(registry: Registry, store: ArtifactStore, runs: Path) -> None:
    before = every_row(registry)
    (store.folder("evaluate", "f" * 64) / "evaluation.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"evaluation\.json cannot be read"):
        registry.rebuild(store, runs)
    assert every_row(registry) == before


def test_artifact_without_its_measurements_is_not_indexed(new_url: Callable[[str], str], store: ArtifactStore) -> None:
    registry = connect(new_url("empty"))
    folder = store.folder("profile", "1" * 64)
    (folder / "routing.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"routing\.safetensors is missing"):
        registry.index_artifact(folder, Record.read(folder))
    assert registry.artifacts() == []


def test_runs_come_back_as_they_were_recorded_newest_first(registry: Registry, runs: Path) -> None:
    recorded = [LifecycleRun.model_validate_json(path.read_bytes()) for path in sorted(runs.glob("*.json"))]
    assert registry.runs() == recorded[::-1]
    assert registry.runs()[0].started_at.tzinfo == UTC
    assert registry.runs(name="small", limit=1) == recorded[1:]
    assert registry.runs(name="large") == []


def test_run_by_id_prefix_and_latest(registry: Registry) -> None:
    assert registry.run("20260301T100000-aaaa") == registry.run("20260301T10") == registry.runs()[1]
    assert registry.run("latest").status == "failed"
    with pytest.raises(InputError, match=r"ambiguous.*20260301T110000-bbbb, 20260301T100000-aaaa"):
        registry.run("2026")
    with pytest.raises(InputError, match=r"'x' does not exist.*20260301T110000-bbbb"):
        registry.run("x")


def test_artifacts_newest_first(registry: Registry) -> None:
    assert [item.fingerprint[0] for item in registry.artifacts()] == list("fedcba210")
    mix = registry.artifacts(stage="mix")[0]
    assert mix.inputs == {
        "branches/code": Input(stage="branch", fingerprint="d" * 64),
        "seed": Input(stage="seed", fingerprint="b" * 64),
        "tokens/code": Input(stage="tokens", fingerprint="c" * 64),
    }
    assert (mix.config, mix.seconds, mix.created_at) == ({"betas": [0.9, 0.95]}, 1.5, START + timedelta(minutes=101))
    assert mix.size == len(json.dumps({"origins": ORIGINS}))
    assert registry.resolve("branch").result == {"final_loss": None}


def test_resolve(registry: Registry) -> None:
    for reference in ("mix", "mix/", "e", "EEE", "mix/ee", "e" * 64):
        assert registry.resolve(reference).fingerprint == "e" * 64
    with pytest.raises(ArtifactError, match=r"'evaluate' is ambiguous: evaluate/f{16}, evaluate/0{16}"):
        registry.resolve("evaluate")
    with pytest.raises(ArtifactError, match=r"No artifact 'mix/7' in the registry. The newest: mix/e{16}"):
        registry.resolve("mix/7")
    for unknown in ("", "%", "_", "tune", "nonsense"):
        with pytest.raises(ArtifactError, match="No artifact"):
            registry.resolve(unknown)


def test_lineage_follows_all_stages_both_ways(registry: Registry) -> None:
    def edge(source: str, letter: str, role: str, target: str, other: str) -> Edge:
        return Edge(Input(stage=source, fingerprint=letter * 64), role, Input(stage=target, fingerprint=other * 64))

    lineage = registry.lineage("branch")
    assert lineage.artifact == Input(stage="branch", fingerprint="d" * 64)
    assert lineage.ancestors == (
        edge("files", "9", "source/code", "corpus", "a"),
        edge("corpus", "a", "corpora/code", "seed", "b"),
        edge("corpus", "a", "corpus", "tokens", "c"),
        edge("seed", "b", "seed", "tokens", "c"),
        edge("seed", "b", "seed", "branch", "d"),
        edge("tokens", "c", "tokens", "branch", "d"),
    )
    assert set(lineage.descendants) == {
        edge("branch", "d", "branches/code", "mix", "e"),
        edge("mix", "e", "model", "evaluate", "f"),
        edge("mix", "e", "model", "profile", "1"),
        edge("mix", "e", "model", "deploy", "2"),
    }
    assert registry.lineage("deploy").descendants == ()


def test_evaluations_of_a_run_stand_in_the_order_of_its_checkpoints(registry: Registry) -> None:
    seed, mix = registry.evaluations(run="20260301T10")
    assert (seed.step, seed.checkpoint.stage, seed.evaluation, seed.task) == ("seed", "seed", "0" * 64, None)
    assert seed.held_out_loss == {"code": 2.5, "docs": None}
    assert seed.tokens == {"code": 100, "docs": 50}
    assert (mix.step, mix.task) == ("mix", TaskResult("chain_sum", 8, 0.25))
    assert registry.evaluations_of("mix") == [mix]
    assert registry.evaluations_of("branch") == []


def test_expert_statistics_are_counts_by_layer_expert_and_domain(registry: Registry) -> None:
    found = registry.expert_statistics("mix")
    assert (found.checkpoint, found.profile) == ("e" * 64, "1" * 64)
    assert found.domains == ("code", "docs")
    assert [list(layer) for layer in found.origins] == ORIGINS
    expected_LED = np.stack([np.array(COUNTS[domain]) for domain in found.domains], axis=-1)
    np.testing.assert_array_equal(found.counts, expected_LED)
    np.testing.assert_array_equal(found.gate_mass, np.stack([GATE_MASS[domain] for domain in found.domains], axis=-1))
    assert found.tokens == ((6, 4), (6, 4))
    with pytest.raises(ArtifactError, match="no profile of b"):
        registry.expert_statistics("seed")


def test_deployments(registry: Registry) -> None:
    deployment = Deployment(
        name="assistant",
        artifact="2" * 64,
        checkpoint=Input(stage="mix", fingerprint="e" * 64),
        dtype="float32",
        max_model_len=512,
        gates=GATES,
        created_at=START + timedelta(minutes=ord("2")),
    )
    assert registry.deployments() == registry.deployments(name="assistant") == [deployment]
    assert registry.deployments(name="other") == []
