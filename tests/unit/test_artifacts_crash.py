"""What other processes can do to a store: be killed with SIGKILL, want the same work, fill the disk.

Each test runs real processes; a line on a child's standard output says how far it has come.
"""

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moestro.artifacts import ArtifactStore, exclusive, fingerprint
from moestro.config import Resources
from moestro.errors import BusyError
from moestro.execution import Step, run_step

IDENTITY = fingerprint("tune", "1", {}, {})

WORKER = f"""
import sys
from pathlib import Path
from moestro.artifacts import ArtifactStore
with ArtifactStore(Path(sys.argv[1])).work("tune", "{IDENTITY}") as work:
    (work.scratch / "state").write_text("step 7")
    (work.out / "model.safetensors").write_bytes(b"half")
    print("working", flush=True)
    sys.stdin.read()
"""

WAITER = """
import sys
from pathlib import Path
from moestro.artifacts import exclusive
print("waiting", flush=True)
with exclusive(Path(sys.argv[1]), what="the home", wait=True):
    print("in", flush=True)
"""

FULL_DISK = """
import shutil
import sys
from pathlib import Path
import numpy as np, torch
from safetensors.torch import save_file
from moestro.artifacts import ArtifactStore
from moestro.errors import ResourceError

tensor = torch.zeros(1_000_000)
folder = Path(sys.argv[1])
writers = {
    "python": lambda out: (out / "a").write_bytes(bytes(4_000_000)),
    "safetensors": lambda out: save_file({"a": tensor}, out / "a"),
    "torch": lambda out: torch.save({"a": tensor}, out / "a"),
    "numpy": lambda out: np.save(out / "a.npy", tensor.numpy()),
}
for name, write in writers.items():
    try:
        with ArtifactStore(folder / name).work("tune", "ab" * 32) as work:
            write(work.out)
    except ResourceError as error:
        print(f"{name}: {error}")
    shutil.rmtree(folder / name)
with (folder / "filler").open("ab", buffering=0) as filler:
    try:
        while True:
            filler.write(bytes(4096))
    except OSError:
        pass
try:
    with ArtifactStore(folder / "late").work("tune", "ab" * 32):
        print("late: began work on a full disk")
except ResourceError as error:
    print(f"late: {error}")
"""


FULL_STAGE = """
import json, pickle, subprocess, sys
from pathlib import Path
from moestro.artifacts import ArtifactStore
from moestro.config import Resources
from moestro.errors import ResourceError
from moestro.execution import run_step

folder, step = Path(sys.argv[1]), pickle.loads(Path(sys.argv[2]).read_bytes())
try:
    run_step(ArtifactStore(folder), step, resources=Resources(cpus=1))
except ResourceError as error:
    print(error)
print([path.name[:13] for path in folder.rglob("step-*")], [path.name for path in folder.glob("artifacts/*/*")])
subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
made = run_step(ArtifactStore(folder), step, resources=Resources(cpus=1))
print(json.dumps({name: entry.blake3 for name, entry in made.record.files.items()}))
"""


@contextmanager
def child(script: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process running `script`; killed at the end if it still lives."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_kill_9_publishes_nothing_frees_the_work_and_leaves_its_scratch(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    with child(WORKER, str(tmp_path)) as worker:
        assert line(worker) == "working"
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait()
    assert store.find("tune", IDENTITY) is None
    assert not (tmp_path / "artifacts").exists()
    with store.work("tune", IDENTITY) as work:
        assert (work.scratch / "state").read_text() == "step 7"
        assert list(work.out.iterdir()) == []


def test_the_same_work_in_two_processes_is_refused_naming_the_first(tmp_path: Path) -> None:
    with child(WORKER, str(tmp_path)) as worker:
        assert line(worker) == "working"
        with (
            pytest.raises(BusyError, match=rf"tune {IDENTITY[:16]} is in use by process {worker.pid} on "),
            ArtifactStore(tmp_path).work("tune", IDENTITY),
        ):
            pass
        assert (tmp_path / "work" / "tune" / f"{IDENTITY[:16]}.1" / "out" / "model.safetensors").exists()


def test_other_work_is_not_held_up(tmp_path: Path) -> None:
    with child(WORKER, str(tmp_path)) as worker:
        assert line(worker) == "working"
        with ArtifactStore(tmp_path).work("tune", fingerprint("tune", "2", {}, {})) as work:
            assert work.out.is_dir()


def test_who_waits_goes_in_when_the_holder_leaves(tmp_path: Path) -> None:
    lock = tmp_path / "run.lock"
    with exclusive(lock, what="the home"):
        waiter_context = child(WAITER, str(lock))
        waiter = waiter_context.__enter__()
        assert line(waiter) == "waiting"
        assert waiter.poll() is None
    try:
        assert line(waiter) == "in"
        assert waiter.wait() == 0
    finally:
        waiter_context.__exit__(None, None, None)


def in_tiny_filesystem(
    folder: Path, script: str, *arguments: str, size: str = "1m"
) -> subprocess.CompletedProcess[str]:
    """Run `script` on a file system of that size that exists for that process alone (a private mount namespace)."""
    mount = f'mount -t tmpfs -o size={size} none "$0" && python="$1" script="$2" && shift 2 && '
    mount += 'exec "$python" -c "$script" "$0" "$@"'
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*unshare, "sh", "-c", 'mount -t tmpfs none "$0"', str(folder)], check=False).returncode:
        pytest.skip("this machine allows no private mounts")
    command = [*unshare, "sh", "-c", mount, str(folder), sys.executable, script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.slow
def test_a_full_disk_is_one_readable_error_whoever_writes(tmp_path: Path) -> None:
    done = in_tiny_filesystem(tmp_path, FULL_DISK)
    lines = dict(text.split(": ", 1) for text in done.stdout.splitlines())
    assert list(lines) == ["python", "safetensors", "torch", "numpy", "late"], done.stderr
    for message in lines.values():
        assert message.startswith("No space left on the disk that holds"), message
        assert "it resumes" in message


@pytest.mark.slow
@pytest.mark.parametrize(("checkpoint_every", "kept"), [(10, "step-00000010"), (30, "step-00000030")])
def test_a_disk_that_fills_in_training_or_in_publishing_is_told_and_the_stage_resumes_when_there_is_room(
    tmp_path: Path, branch_step: Callable[..., Step], checkpoint_every: int, kept: str
) -> None:
    """A checkpoint has 0.6 MB, the model 0.5 MB: there is no room for a second one of either beside the first."""
    step = branch_step(30, checkpoint_every=checkpoint_every)
    (tmp_path / "step").write_bytes(pickle.dumps(step))
    (tmp_path / "disk").mkdir()
    done = in_tiny_filesystem(tmp_path / "disk", FULL_STAGE, str(tmp_path / "step"), size="900k")
    assert done.returncode == 0, done.stderr
    message, left, files = done.stdout.splitlines()[-3:]
    assert message.startswith("No space left on the disk that holds"), message
    assert "it resumes" in message
    assert left == f"['{kept}'] []"
    alone = run_step(ArtifactStore(tmp_path / "alone"), step, resources=Resources(cpus=1))
    assert json.loads(files) == {name: entry.blake3 for name, entry in alone.record.files.items()}
