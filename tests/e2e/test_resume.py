"""kill -9 of the driver in the middle of branch, tune and rl, then the same command again: the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CONFIG = Path(__file__).parent / "tiny.yaml"
KILL_IN = ("branch", "tune", "rl")
DEADLINE = 300.0


def moestro(home: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Start the command in a process group of its own, its output in a file (children may outlive it)."""
    home.mkdir(exist_ok=True)
    log = (home / "output.txt").open("ab")
    return subprocess.Popen(
        [sys.executable, "-m", "moestro_services.cli", *arguments],
        env={**os.environ, "MOESTRO_HOME": str(home)},
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[bytes], home: Path) -> None:
    """Wait for success."""
    code = process.wait(DEADLINE)
    assert code == 0, (home / "output.txt").read_text()[-4000:]


def run_until_checkpoint(home: Path, stage: str) -> None:
    """Run until `stage` has left something to resume from, then kill -9 the driver."""
    process = moestro(home, "run", str(CONFIG), "--no-ask")
    end = time.monotonic() + DEADLINE
    while not any(path.is_file() for path in home.glob(f"work/{stage}/*/scratch/**/*.safetensors")):
        assert process.poll() is None, (home / "output.txt").read_text()[-4000:]
        assert time.monotonic() < end, f"{stage} wrote no checkpoint"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not list(home.glob(f"artifacts/{stage}/*")) or stage == "branch"


def published(home: Path) -> dict[str, dict[str, str]]:
    """Every artifact's files with their digests."""
    found = {}
    for path in home.glob("artifacts/*/*/artifact.json"):
        record = json.loads(path.read_text())
        found[f"{record['stage']}/{record['fingerprint']}"] = {
            name: entry["sha256"] for name, entry in record["files"].items()
        }
    return found


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_in_branch_tune_and_rl_ends_in_the_same_bytes(tmp_path: Path) -> None:
    disturbed, undisturbed = tmp_path / "disturbed", tmp_path / "undisturbed"
    for stage in KILL_IN:
        run_until_checkpoint(disturbed, stage)
    finish(moestro(disturbed, "run", str(CONFIG), "--no-ask"), disturbed)
    finish(moestro(undisturbed, "run", str(CONFIG), "--no-ask"), undisturbed)
    assert published(disturbed) == published(undisturbed)
    assert not list(disturbed.glob("work/*/*/scratch"))
