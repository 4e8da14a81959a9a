"""What a user sees of a lifecycle: reuse, plans, refusals, indexes, and nothing left running."""

import json
import os
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from moestro.artifacts import exclusive

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

INTERRUPTIONS = [
    lambda pid: os.killpg(pid, signal.SIGINT),  # as a terminal does
    lambda pid: os.kill(pid, signal.SIGTERM),
]


def changed(config: Path, folder: Path, path: str, value: Any) -> Path:
    """A copy of the config with the field at the dotted `path` set."""
    data = yaml.safe_load(config.read_text())
    *parents, last = path.split(".")
    place = data
    for part in parents:
        place = place[int(part)] if isinstance(place, list) else place[part]
    place[last] = value
    target = folder / "changed.yaml"
    target.write_text(yaml.safe_dump(data))
    return target


def test_a_second_run_reuses_every_step(moestro: Any, finished: Path) -> None:
    code, out, err = moestro.run(finished, "run", str(moestro.config), "--json")
    assert code == 0, err
    steps = json.loads(out)["steps"]
    assert len(steps) == 23
    assert {step["status"] for step in steps} == {"reused"}


def test_the_plan_names_the_field_and_only_later_steps_run(moestro: Any, finished: Path, tmp_path: Path) -> None:
    config = changed(moestro.config, tmp_path, "compress.criterion", "frequency")
    code, out, _ = moestro.run(finished, "plan", str(config), "--json")
    assert code == 0
    steps = {step["step"]: step for step in json.loads(out)["steps"]}
    running = [name for name, step in steps.items() if step["action"] == "run"]
    assert running == ["compress", "evaluate compress", "profile compress", "deploy"]
    assert steps["compress"]["reason"] == "criterion: 'reap' -> 'frequency'"


def test_a_corrupted_artifact_is_named_and_not_used(moestro: Any, finished: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    shutil.copytree(finished / "artifacts", home / "artifacts")
    weights = next(home.glob("artifacts/mix/*/model.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, _, err = moestro.run(home, "run", str(moestro.config), "--no-ask")
    assert code == 2
    assert str(weights) in err
    assert "Traceback" not in err


def test_a_second_run_on_a_busy_home_says_so(moestro: Any, finished: Path) -> None:
    with exclusive(finished / "run.lock", what="the test"):
        code, _, err = moestro.run(finished, "run", str(moestro.config))
    assert code == 2
    assert "in use by process" in err


@pytest.mark.parametrize("end_run", INTERRUPTIONS, ids=["ctrl-c", "sigterm"])
def test_interrupting_leaves_no_process_and_nothing_half_published(
    moestro: Any,
    finished: Path,
    tmp_path: Path,
    processes_of: Callable[[Path], list[str]],
    end_run: Callable[[int], None],
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    shutil.copytree(finished / "artifacts", home / "artifacts")
    config = changed(moestro.config, tmp_path, "tune.training.steps", 9_000)
    process = moestro.start(home, "run", str(config), "--no-ask")
    end = time.monotonic() + 300
    while not list(home.glob("work/tune/*/scratch/*")):
        assert process.poll() is None, (home / "stderr.txt").read_text()
        assert time.monotonic() < end
        time.sleep(0.05)
    end_run(process.pid)
    assert process.wait(60) == 130
    end = time.monotonic() + 30
    while left := processes_of(home):
        assert time.monotonic() < end, left
        time.sleep(0.1)
    runs = [json.loads(path.read_text()) for path in home.glob("runs/*.json")]
    assert [run["status"] for run in runs] == ["cancelled"]
    assert len(list(home.glob("artifacts/tune/*"))) == 1
    assert "Traceback" not in (home / "stderr.txt").read_text()


def test_mlflow_has_a_nested_run_per_step_and_no_stray_ones(finished: Path) -> None:
    with sqlite3.connect(finished / "mlflow.db") as database:
        runs = dict(database.execute("select run_uuid, status from runs").fetchall())
        parents = dict(database.execute("select run_uuid, value from tags where key = 'mlflow.parentRunId'").fetchall())
        aliases = database.execute("select name, alias from registered_model_aliases").fetchall()
        metrics = {key for (key,) in database.execute("select distinct key from metrics").fetchall()}
    assert set(runs.values()) == {"FINISHED"}
    record = json.loads(min(finished.glob("runs/*.json")).read_text())
    assert {step["mlflow_run_id"] for step in record["steps"]} <= set(runs)
    assert set(parents.values()) == {record["mlflow_run_id"]}
    assert len(parents) == len(record["steps"])
    assert aliases == [("tiny", "champion")]
    assert {"loss", "grad_norm", "reward"} <= metrics


def test_the_registry_can_be_made_again_from_the_records(moestro: Any, finished: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    shutil.copytree(finished / "artifacts", home / "artifacts")
    shutil.copytree(finished / "runs", home / "runs")
    code, _, err = moestro.run(home, "index", "rebuild", "--json")
    assert code == 0, err
    query = "select stage, fingerprint from artifacts order by fingerprint"
    with sqlite3.connect(finished / "registry.db") as one, sqlite3.connect(home / "registry.db") as other:
        assert one.execute(query).fetchall() == other.execute(query).fetchall() != []


def test_prefect_tells_the_story(finished: Path) -> None:
    with sqlite3.connect(finished / "prefect" / "prefect.db") as database:
        flows = database.execute("select name, state_name from flow_run").fetchall()
        tasks = dict(database.execute("select name, state_name from task_run").fetchall())
        artifacts = {key for (key,) in database.execute("select key from artifact").fetchall()}
    assert ("tiny", "Completed") in flows
    assert {"seed", "branch code", "evaluate mix", "rl", "deploy"} <= set(tasks)
    assert set(tasks.values()) <= {"Completed", "Reused"}
    assert "summary" in artifacts


def test_what_was_made_can_be_shown(moestro: Any, finished: Path, tmp_path: Path) -> None:
    code, out, err = moestro.run(finished, "show", "--json")
    assert code == 0, err
    code, out, err = moestro.run(finished, "experts", "compress", "--json")
    assert code == 0, err
    assert "math" in out
    page = tmp_path / "report.html"
    code, _, err = moestro.run(finished, "report", "--out", str(page))
    assert code == 0, err
    assert "held-out" in page.read_text().lower()


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("seed.training.step", 3, "did you mean 'steps'"),
        ("data.domains.0.source", {"type": "files", "paths": ["nowhere/*.txt"]}, "nowhere/*.txt"),
        ("data.domains.0.source.max_bytes", 2000, "documents"),
        ("seed", {"type": "import", "path": "nowhere"}, "nowhere"),
        ("rl.task.name", "chain_sums", "chain_sum"),
    ],
)
def test_bad_input_is_one_clear_error_before_any_work(
    moestro: Any, tmp_path: Path, path: str, value: Any, expected: str
) -> None:
    config = changed(moestro.config, tmp_path, path, value)
    home = tmp_path / "home"
    code, out, err = moestro.run(home, "run", str(config))
    assert code == 2
    assert out == ""
    assert expected in err
    assert "Traceback" not in err
    assert not [path for path in home.glob("artifacts/*/*") if path.parent.name in {"seed", "branch"}]
