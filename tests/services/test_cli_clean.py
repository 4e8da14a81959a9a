"""`moestro clean` takes what interrupted stages left, and nothing that anybody works in or that is published."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moestro.artifacts import exclusive
from moestro.errors import BusyError
from moestro_flows.home import Home
from moestro_services.cli.app import app
from moestro_services.machine import folder

ABANDONED, RUNNING = "a" * 16, "b" * 16
HOLD = """
import sys
from pathlib import Path
from moestro.artifacts import ArtifactStore
with ArtifactStore(Path(sys.argv[1])).work("tune", "b" * 64) as work:
    (work.scratch / "state").write_bytes(b"2" * 20)
    print("working", flush=True)
    sys.stdin.read()
"""


def leave(home: Home, stage: str, name: str, count: int) -> Path:
    """What a killed stage leaves."""
    folder = home.path / "work" / stage / f"{name}.3"
    (folder / "scratch").mkdir(parents=True)
    (folder / "scratch" / "state").write_bytes(b"1" * count)
    folder.with_name(f"{folder.name}.lock").write_text('{"pid": 1, "host": "gone", "labels": {}}')
    return folder


def clean() -> dict[str, Any]:
    result = CliRunner().invoke(app, ["clean", "--json"])
    assert result.exception is None, result.exception
    told: dict[str, Any] = json.loads(result.stdout)
    return told


def test_abandoned_scratch_goes_and_a_running_process_keeps_its_own(built_home: Home) -> None:
    published = sorted(path for path in (built_home.path / "artifacts").rglob("*"))
    gone = leave(built_home, "tune", ABANDONED, 30)
    command = [sys.executable, "-c", HOLD, str(built_home.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        found = folder.look(built_home)
        assert (found.unfinished, found.scratch_bytes) == ((f"tune/{ABANDONED}", f"tune/{RUNNING}"), 50)
        assert clean() == {
            "removed": [{"name": f"tune/{ABANDONED}", "size": 30}],
            "in_use": [f"tune/{RUNNING}"],
            "size": 30,
        }
        assert not gone.exists()
        assert (built_home.path / "work" / "tune" / f"{RUNNING}.1" / "scratch" / "state").read_bytes() == b"2" * 20
        process.kill()
    assert clean()["removed"] == [{"name": f"tune/{RUNNING}", "size": 20}]
    assert clean() == {"removed": [], "in_use": [], "size": 0}
    assert sorted(path for path in (built_home.path / "artifacts").rglob("*")) == published


def test_nothing_is_taken_from_a_running_lifecycle(built_home: Home) -> None:
    kept = leave(built_home, "rl", ABANDONED, 1)
    with exclusive(built_home.lock, what="the home"):
        result: Any = CliRunner().invoke(app, ["clean"])
    assert isinstance(result.exception, BusyError)
    assert kept.exists()


def test_a_home_that_is_not_there_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESTRO_HOME", str(tmp_path / "home"))
    assert clean()["removed"] == []
    assert not (tmp_path / "home").exists()


def test_doctor_tells_how_much_there_is_and_how_to_remove_it(built_home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    from moestro_services.machine import software

    monkeypatch.setattr(software, "PROBES", dict.fromkeys(software.PROBES, "print('{}')"))
    leave(built_home, "rl", ABANDONED, 3000)
    shown = " ".join(CliRunner().invoke(app, ["doctor"]).stdout.split())
    assert "3.0 kB" in shown
    assert "moestro clean" in shown
