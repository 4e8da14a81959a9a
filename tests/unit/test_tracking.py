"""MLflow as Moestro uses it: exactly the runs that were asked for, closed, nested and complete."""

import json
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from matplotlib.figure import Figure

from moestro.errors import ConfigError, ResourceError
from moestro.registry import TrackedRun, Tracker
from moestro.registry.params import MAX_VALUE, entity_name, flatten_params
from moestro.registry.tracked_run import client

if TYPE_CHECKING:
    from mlflow.entities import Run

PREPARE = """
import sys
from moestro.registry import Tracker
print("ready", flush=True)
sys.stdin.readline()
Tracker(sys.argv[1], sys.argv[2]).prepare()
"""


class Listener:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.heard: list[object] = []

    def progress(self, done: int, total: int, message: str = "") -> None:
        """Remember."""
        self.heard.append((done, total, message))

    def metrics(self, values: object, step: int) -> None:
        """Remember."""
        self.heard.append((values, step))


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """URI of one MLflow database for all tests here (making one takes seconds), and a folder for files."""
    folder = tmp_path_factory.mktemp("mlflow with space")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    Tracker(uri, (folder / "first").as_uri()).prepare()
    return uri, folder


@pytest.fixture
def tracker(embedded: tuple[str, Path], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    """A home and an experiment of its own per test; the working directory must stay clean."""
    uri, folder = embedded
    name = request.node.name
    tracker = Tracker(uri, (folder / name).as_uri(), experiment=name)
    tracker.prepare()
    (folder / f"{name}.cwd").mkdir()
    monkeypatch.chdir(folder / f"{name}.cwd")
    return tracker


def all_runs(tracker: Tracker) -> "dict[str, Run]":
    """Every run of the tracker's experiment by name."""
    mlflow = client(tracker.uri)
    experiment = mlflow.get_experiment_by_name(tracker.experiment)
    assert experiment
    return {run.info.run_name: run for run in mlflow.search_runs([experiment.experiment_id])}


def start(tracker: Tracker, name: str, parent: str | None = None) -> TrackedRun:
    """A run without params."""
    return tracker.start(name, parent=parent, params={}, tags={})


def test_lifecycle_leaves_exactly_its_runs(tracker: Tracker) -> None:
    parent = tracker.start("small", parent=None, params={"seed": {"steps": 3}}, tags={"moestro.run": "r1"})
    for name, status in (("seed", "completed"), ("branch code", "failed"), ("mix", "cancelled")):
        child = start(tracker, name, parent.id)
        child.metrics({"loss": 1.0}, 0)
        child.finish(status, "it broke" if status == "failed" else "")
    parent.finish()
    parent.finish()
    runs = all_runs(tracker)
    assert {name: run.info.status for name, run in runs.items()} == {
        "small": "FINISHED",
        "seed": "FINISHED",
        "branch code": "FAILED",
        "mix": "KILLED",
    }
    assert {run.data.tags.get("mlflow.parentRunId") for name, run in runs.items() if name != "small"} == {parent.id}
    assert "mlflow.parentRunId" not in runs["small"].data.tags
    assert runs["small"].data.params == {"seed.steps": "3"}
    assert runs["small"].data.tags["moestro.run"] == "r1"
    assert runs["branch code"].data.tags["moestro.error"] == "it broke"
    assert list(Path.cwd().iterdir()) == []


def test_metrics_are_buffered_and_complete_after_finish(tracker: Tracker) -> None:
    run = start(tracker, "tune")
    mlflow = client(tracker.uri)
    for step in range(30):
        run.metrics({"loss": 1 / (step + 1), "held_out/code [nats]": float("nan")}, step)
    assert mlflow.get_metric_history(run.id, "loss") == []
    for step in range(30, 1210):
        run.metrics({"loss": 1 / (step + 1)}, step)
    assert len(mlflow.get_metric_history(run.id, "loss")) >= 500
    run.finish()
    history = mlflow.get_metric_history(run.id, "loss")
    assert sorted((item.step, item.value) for item in history) == [(step, 1 / (step + 1)) for step in range(1210)]
    assert len(mlflow.get_metric_history(run.id, "held_out/code _nats_")) == 30


def test_figure_record_and_table_are_kept(tracker: Tracker, tmp_path: Path) -> None:
    run = start(tracker, "profile")
    run.log_record({"stage": "profile", "result": {"dead_experts": 0}})
    run.log_figure("experts", Figure())
    run.log_table("losses", {"domain": ["code", "docs"], "loss": [2.5, 3.5]})
    run.finish()
    mlflow = client(tracker.uri)
    folder = Path(mlflow.download_artifacts(run.id, "", str(tmp_path)))
    assert json.loads((folder / "record.json").read_text())["result"] == {"dead_experts": 0}
    assert (folder / "figures/experts.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "tables/losses.json").read_text())["data"] == [["code", 2.5], ["docs", 3.5]]
    assert (tracker.files / tracker.experiment / run.id).is_dir()


def test_run_can_be_reported_to_from_elsewhere_without_stray_runs(tracker: Tracker) -> None:
    run = start(tracker, "branch")
    run.metrics({"loss": 4.0}, 0)
    elsewhere = pickle.loads(pickle.dumps(run))

    def work() -> None:
        elsewhere.metrics({"loss": 3.0}, 1)
        elsewhere.flush()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    run.finish()
    history = client(tracker.uri).get_metric_history(run.id, "loss")
    assert sorted((item.step, item.value) for item in history) == [(0, 4.0), (1, 3.0)]
    assert set(all_runs(tracker)) == {"branch"}


def test_listener_hears_progress_and_metrics(tracker: Tracker) -> None:
    listener = Listener()
    run = tracker.start("seed", parent=None, params={}, tags={}, listener=listener)
    run.progress(1, 2, "loss 3.0")
    run.metrics({"loss": 3.0}, 1)
    run.finish()
    assert listener.heard == [(1, 2, "loss 3.0"), ({"loss": 3.0}, 1)]


def test_reconcile_kills_stale_runs_of_this_home_alone(tracker: Tracker) -> None:
    stale, live, done = start(tracker, "stale"), start(tracker, "live"), start(tracker, "done")
    done.finish()
    other_home = Tracker(tracker.uri, f"{tracker.files.as_uri()}-other", experiment=tracker.experiment)
    other_home.prepare()
    start(other_home, "other")
    assert tracker.reconcile(live=[live.id]) == [stale.id]
    assert {name: run.info.status for name, run in all_runs(tracker).items()} == {
        "stale": "KILLED",
        "live": "RUNNING",
        "done": "FINISHED",
        "other": "RUNNING",
    }
    assert all_runs(tracker)["stale"].info.end_time
    assert tracker.reconcile() == [live.id]
    assert tracker.reconcile() == []


def test_long_and_many_params_are_kept_within_the_limits(tracker: Tracker) -> None:
    params = {"prompt": "x" * 10_000, "many": {f"p{number}": number for number in range(250)}}
    run = tracker.start("long", parent=None, params=params, tags={"note": "y" * 10_000})
    run.finish()
    data = all_runs(tracker)["long"].data
    assert len(data.params) == 251
    assert data.params["prompt"] == "x" * (MAX_VALUE - 1) + "…"
    assert data.tags["note"].startswith("yyy")


def test_params_are_flattened_by_dotted_name() -> None:
    nested = {
        "training": {"steps": 5, "betas": (0.9, 0.95)},
        "domains": [{"name": "code"}, {"name": "docs"}],
        "task": None,
        "r3": True,
        "name (odd)": "n",
    }
    assert flatten_params(nested) == {
        "training.steps": "5",
        "training.betas": "[0.9, 0.95]",
        "domains.0.name": "code",
        "domains.1.name": "docs",
        "task": "null",
        "r3": "true",
        "name _odd_": "n",
    }
    assert entity_name("größe[0]") == "gr__e_0_"


def test_deleted_experiment_comes_back(tracker: Tracker) -> None:
    mlflow = client(tracker.uri)
    experiment = mlflow.get_experiment_by_name(tracker.experiment)
    assert experiment
    mlflow.delete_experiment(experiment.experiment_id)
    tracker.prepare()
    start(tracker, "again").finish()
    assert set(all_runs(tracker)) == {"again"}


def test_tracker_that_was_not_prepared_says_so(embedded: tuple[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="Prepare the tracker first"):
        start(Tracker(embedded[0], (tmp_path / "new").as_uri()), "run")


def test_unreachable_server_is_reported_at_once_without_its_password(tmp_path: Path) -> None:
    tracker = Tracker("http://someone:hunter2@127.0.0.1:1", tmp_path.as_uri())
    with pytest.raises(ResourceError, match=r"http://127\.0\.0\.1:1 cannot be reached") as caught:
        tracker.prepare()
    assert "hunter2" not in str(caught.value)


def test_files_must_lie_in_a_local_folder() -> None:
    with pytest.raises(ConfigError, match="local folder"):
        Tracker("sqlite:////nowhere/mlflow.db", "s3://bucket/mlflow")


@pytest.mark.slow
def test_four_processes_prepare_a_fresh_database_quietly(tmp_path: Path) -> None:
    uri, files = f"sqlite:///{tmp_path / 'mlflow.db'}", (tmp_path / "mlflow").as_uri()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PREPARE, uri, files],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
        for _ in range(4)
    ]
    try:
        for process in processes:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
        results = [process.communicate("\n", timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * 4, results
    assert results == [("", "")] * 4
    assert {path.name for path in tmp_path.iterdir()} <= {
        "mlflow",
        *(f"mlflow.db{end}" for end in ("", ".lock", "-wal", "-shm")),
    }
