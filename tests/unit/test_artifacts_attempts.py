"""Attempts are fenced: one that was thought dead and lives ends with a clear error and changes nothing."""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moestro.artifacts import ArtifactStore, Claimant, Record, digest_files, file_digest, fingerprint
from moestro.config import Resources
from moestro.errors import BusyError, StaleAttemptError
from moestro.execution import Step, run_step

IDENTITY = fingerprint("mix", "1", {}, {})
NAME = IDENTITY[:16]
TAKES_OVER = Claimant({"worker": "second"}, lambda labels: labels == {"worker": "first"})
FIRST = Claimant({"worker": "first"})

WORKER = """
import pickle, sys
from pathlib import Path
import torch
from moestro.artifacts import ArtifactStore, Claimant, SilentReporter
from moestro.config import Resources
from moestro.errors import MoestroError
from moestro.execution import run_step

class Pipe(SilentReporter):
    def progress(self, done, total, message=""):
        print(done, flush=True)
        sys.stdin.readline()

step = pickle.loads(Path(sys.argv[2]).read_bytes())
try:
    run_step(ArtifactStore(Path(sys.argv[1])), step, resources=Resources(cpus=1), reporter=Pipe(),
             claimant=Claimant({"worker": "first"}))
except MoestroError as error:
    print(type(error).__name__, error, flush=True)
"""


def record(folder: Path) -> Record:
    return Record.model_validate(
        {
            "stage": "mix",
            "version": "1",
            "fingerprint": IDENTITY,
            "inputs": {},
            "config": {},
            "result": {},
            "files": digest_files(folder),
            "code_version": "0",
            "created_at": "2026-01-02T03:04:05Z",
            "seconds": 1.0,
        }
    )


def everything(root: Path) -> dict[str, str | int]:
    """Digest of each file, and inode of each folder."""
    return {
        str(path.relative_to(root)): file_digest(path) if path.is_file() else path.stat().st_ino
        for path in sorted(root.rglob("*"))
    }


def test_numbers_grow_beyond_publishing_and_one_claim_is_kept(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    for number in (1, 2, 3):
        with store.work("mix", IDENTITY) as work:
            assert work.attempt.number == number
            (work.scratch / f"{number}").write_text("kept")
        assert sorted(path.name for path in (tmp_path / "work/mix").iterdir()) == [
            f"{NAME}.{number}",
            f"{NAME}.{number}.lock",
        ]
    with store.work("mix", IDENTITY) as work:
        assert sorted(path.name for path in work.scratch.iterdir()) == ["1", "2", "3"]
        store.publish(work, record(work.out))
    with store.work("mix", IDENTITY) as work:
        assert work.attempt.number == 5
        assert list(work.scratch.iterdir()) == []


def test_only_who_is_known_to_be_lost_is_taken_over(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    with store.work("mix", IDENTITY, claimant=Claimant({"worker": "other"})):
        before = everything(tmp_path)
        with pytest.raises(BusyError, match=f"in use by process {os.getpid()} on "):
            store.work("mix", IDENTITY, claimant=TAKES_OVER).__enter__()
        assert everything(tmp_path) == before


@pytest.mark.parametrize("published", [False, True])
def test_a_stale_attempt_cannot_publish(tmp_path: Path, published: bool) -> None:
    store = ArtifactStore(tmp_path)
    first = store.work("mix", IDENTITY, claimant=FIRST)
    old = first.__enter__()
    (old.out / "model").write_text("old")
    second = store.work("mix", IDENTITY, claimant=TAKES_OVER)
    new = second.__enter__()
    assert list(new.out.iterdir()) == []
    (new.out / "model").write_text("new")
    if published:
        made = store.publish(new, record(new.out))
        second.__exit__(None, None, None)
    before = everything(tmp_path)
    with pytest.raises(StaleAttemptError, match=r"Attempt 1 at mix .* attempt 2 by process \d+ on .* has taken over"):
        store.publish(old, record(new.out if not published else made.path))
    assert everything(tmp_path) == before
    if not published:
        assert (store.publish(new, record(new.out)).path / "model").read_text() == "new"


def overtake(tmp_path: Path, act: Callable[[Any], object]) -> None:
    """Let an attempt be overtaken in the middle, and then go on with `act`."""
    store = ArtifactStore(tmp_path)
    with store.work("mix", IDENTITY, claimant=FIRST) as old:
        with store.work("mix", IDENTITY, claimant=TAKES_OVER) as new:
            (new.scratch / "state").write_text("new")
        act(old)
        raise AssertionError("it was not noticed")


def again(folder: Path) -> None:
    """As code does that makes the folders it wants: what it wrote is to vanish."""
    folder.mkdir(parents=True)
    (folder / "state").write_text("old")
    raise ZeroDivisionError


@pytest.mark.parametrize(
    "act",
    [
        lambda work: (work.scratch / "state").write_text("old"),
        lambda work: (work.out / "model").write_text("old"),
        lambda work: again(work.scratch),
    ],
)
def test_whatever_a_stale_attempt_stumbles_over_is_told_as_what_it_is(
    tmp_path: Path, act: Callable[[Any], object]
) -> None:
    with pytest.raises(StaleAttemptError, match="Run the same command again"):
        overtake(tmp_path, act)
    assert sorted(path.name for path in (tmp_path / "work/mix").iterdir()) == [f"{NAME}.2", f"{NAME}.2.lock"]
    assert (tmp_path / "work/mix" / f"{NAME}.2" / "scratch" / "state").read_text() == "new"


def test_of_many_who_begin_at_once_one_works_and_the_others_are_refused(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from moestro.artifacts import ArtifactStore
from moestro.errors import BusyError
sys.stdin.readline()
try:
    with ArtifactStore(Path(sys.argv[1])).work("mix", sys.argv[2]):
        print("in", flush=True)
        sys.stdin.readline()
except BusyError:
    print("busy", flush=True)
"""
    command = [sys.executable, "-c", script, str(tmp_path), IDENTITY]
    crowd = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    try:
        for process in crowd:
            assert process.stdin
            process.stdin.write("go\n")
            process.stdin.flush()
        told = [process.stdout.readline().strip() for process in crowd if process.stdout]
    finally:
        for process in crowd:
            process.kill()
            process.communicate()
    assert sorted(told) == ["busy"] * 5 + ["in"]


@pytest.mark.slow
@pytest.mark.parametrize("stopped_at", [7, 30])
def test_a_stopped_process_that_goes_on_after_another_has_published(
    tmp_path: Path, branch_step: Callable[..., Step], stopped_at: int
) -> None:
    step = branch_step(30, checkpoint_every=5)
    (tmp_path / "step").write_bytes(pickle.dumps(step))
    store = ArtifactStore(tmp_path / "home")
    command = [sys.executable, "-c", WORKER, str(store.root), str(tmp_path / "step")]
    zombie = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert zombie.stdin
    assert zombie.stdout
    try:
        while int(zombie.stdout.readline()) < stopped_at:
            zombie.stdin.write("on\n")
            zombie.stdin.flush()
        os.kill(zombie.pid, signal.SIGSTOP)
        with pytest.raises(BusyError, match=f"process {zombie.pid} on "):
            run_step(store, step, resources=Resources(cpus=1))
        made = run_step(store, step, resources=Resources(cpus=1), claimant=TAKES_OVER)
        before = everything(store.root)
        os.kill(zombie.pid, signal.SIGCONT)
        told = zombie.communicate("on\n" * 30)[0].splitlines()
    finally:
        zombie.kill()
        zombie.communicate()
    assert told[-1].startswith(f"StaleAttemptError Attempt 1 at branch {made.fingerprint[:16]} was thought lost")
    assert everything(store.root) == before
    alone = run_step(ArtifactStore(tmp_path / "alone"), step, resources=Resources(cpus=1))
    assert made.record.files == alone.record.files
