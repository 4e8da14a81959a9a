"""A finished tiny lifecycle, made once by the real command, and the command itself."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

DEADLINE = 900.0


@dataclass(frozen=True)
class Command:
    """`moestro` as a user runs it, in a process group of its own, without this process's secret for Ray; what it prints
    goes to files in the home, since children may outlive it and would hold a pipe open."""

    config: Path

    def start(self, home: Path, *arguments: str) -> "subprocess.Popen[bytes]":
        """Start it."""
        home.mkdir(exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
        with (home / "stdout.txt").open("wb") as out, (home / "stderr.txt").open("wb") as err:
            return subprocess.Popen(
                [sys.executable, "-m", "moestro_services.cli", *arguments],
                env=environment | {"MOESTRO_HOME": str(home)},
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def run(self, home: Path, *arguments: str) -> tuple[int, str, str]:
        """Run it to its end: exit code, standard output, standard error."""
        code = self.start(home, *arguments).wait(DEADLINE)
        return code, (home / "stdout.txt").read_text(), (home / "stderr.txt").read_text()


@pytest.fixture(scope="session")
def moestro() -> Command:
    return Command(Path(__file__).parent / "tiny.yaml")


@pytest.fixture(scope="session")
def finished(moestro: Command, tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The home of a lifecycle that ran undisturbed, one for all workers of pytest-xdist. Tests leave its artifacts as
    they are."""
    own = tmp_path_factory.getbasetemp()
    home = (own if worker_id == "master" else own.parent) / "finished"
    done = home / "done"
    with FileLock(f"{home}.lock"):
        if not done.exists():
            code, _, err = moestro.run(home, "run", str(moestro.config), "--no-ask")
            assert code == 0, err[-4000:]
            done.touch()
    return home


@pytest.fixture
def processes_of() -> Callable[[Path], list[str]]:
    """Command lines of all processes whose MOESTRO_HOME is the given folder."""

    def find(home: Path) -> list[str]:
        found = []
        for environ in Path("/proc").glob("[0-9]*/environ"):
            try:
                if f"MOESTRO_HOME={home}".encode() in environ.read_bytes().split(b"\0"):
                    found.append((environ.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue  # it ended while we looked
        return [line for line in found if line]

    return find
