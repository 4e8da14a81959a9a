"""kill -9 of the driver in the middle of branch, tune and rl, then the same command again: the same bytes."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
DEADLINE = 600.0


def run_until_checkpoint(moestro: Any, home: Path, stage: str) -> None:
    """Run until `stage` has left something to resume from, then kill -9 the driver."""
    process = moestro.start(home, "run", str(moestro.config), "--no-ask")
    end = time.monotonic() + DEADLINE
    while not any(path.is_file() for path in home.glob(f"work/{stage}/*/scratch/**/step-*.pt")):
        assert process.poll() is None, (home / "stderr.txt").read_text()[-4000:]
        assert time.monotonic() < end, f"{stage} wrote no checkpoint"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    unfinished = [path for path in home.glob(f"work/{stage}/*/scratch") if any(path.iterdir())]
    assert unfinished, f"{stage} was done before it was killed"


def published(home: Path) -> dict[str, dict[str, str]]:
    """Every artifact's files with their digests."""
    found = {}
    for path in home.glob("artifacts/*/*/artifact.json"):
        record = json.loads(path.read_text())
        files = {name: entry["blake3"] for name, entry in record["files"].items()}
        found[f"{record['stage']}/{record['fingerprint']}"] = files
    return found


def test_killed_in_branch_tune_and_rl_ends_in_the_same_bytes(
    moestro: Any, finished: Path, tmp_path: Path, processes_of: Callable[[Path], list[str]]
) -> None:
    home = tmp_path / "disturbed"
    for stage in ("branch", "tune", "rl"):
        run_until_checkpoint(moestro, home, stage)
    code, _, err = moestro.run(home, "run", str(moestro.config), "--no-ask")
    assert code == 0, err[-4000:]
    assert published(home) == published(finished)
    assert not list(home.glob("work/*/*/scratch"))
    runs = [json.loads(path.read_text())["status"] for path in sorted(home.glob("runs/*.json"))]
    assert runs == ["cancelled", "cancelled", "cancelled", "completed"]
    end = time.monotonic() + 30
    while left := processes_of(home):
        assert time.monotonic() < end, left
        time.sleep(0.1)
