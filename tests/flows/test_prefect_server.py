"""The ephemeral Prefect server of a killed driver is ended by the next run; an address that is dead is named."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from moestro.errors import ResourceError
from moestro_flows.home import Home
from moestro_flows.server import end_orphans, reach

DRIVER = """
import subprocess, sys
from pathlib import Path
from moestro_flows.home import Home
from moestro_flows.server import sign_own

sign_own(Home(Path(sys.argv[1])))
code = "import signal; signal.pause()"
subprocess.Popen([sys.executable, "-c", code, "prefect.server.api.server:create_app"])
sys.stdin.read()
"""
REAL_DRIVER = """
from moestro_flows.home import Home
from moestro_flows.stages import _start_server

_start_server(Home.current())
"""
START_SECONDS = 120


@contextmanager
def server_of(code: str, home: Path) -> Iterator[tuple["subprocess.Popen[str]", psutil.Process]]:
    """A process that runs `code`, and the server that it has just spawned; neither outlives the block."""
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    command = [sys.executable, "-c", code, str(home)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, text=True, env=environment | {"MOESTRO_HOME": str(home)}
    ) as driver:
        server = None
        try:
            server = spawned(driver.pid)
            yield driver, server
        finally:
            driver.kill()
            if server:
                with suppress(psutil.NoSuchProcess):
                    server.kill()


def spawned(driver: int) -> psutil.Process:
    """The server among the children of `driver`, once it is there."""
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        for child in psutil.Process(driver).children():
            with suppress(psutil.NoSuchProcess):
                if "prefect.server" in " ".join(child.cmdline()):
                    return child
        time.sleep(0.01)
    raise TimeoutError


def alive(server: psutil.Process) -> bool:
    return server.is_running() and server.status() != psutil.STATUS_ZOMBIE


def test_a_killed_drivers_server_is_ended_and_a_living_ones_is_not(tmp_path: Path) -> None:
    with server_of(DRIVER, tmp_path) as (driver, server):
        end_orphans(Home(tmp_path))
        assert alive(server)
        driver.kill()
        driver.wait()
        end_orphans(Home(tmp_path / "another"))
        assert alive(server)
        end_orphans(Home(tmp_path))
        assert psutil.wait_procs([server], timeout=10)[0] == [server]


def test_a_driver_that_is_killed_while_its_server_starts_leaves_none_behind(tmp_path: Path) -> None:
    with server_of(REAL_DRIVER, tmp_path) as (driver, server):
        driver.kill()
        driver.wait()
        end_orphans(Home(tmp_path))
        assert psutil.wait_procs([server], timeout=10)[0] == [server]


def test_servers_of_others_are_left_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import signal; signal.pause()", "prefect.server.api.server:create_app"]
    with subprocess.Popen(command) as other:
        try:
            end_orphans(Home(tmp_path))
            assert other.poll() is None
        finally:
            other.kill()


def test_a_prefect_server_that_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    reach(Home(tmp_path))
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    with pytest.raises(ResourceError, match=r"127\.0\.0\.1:1/api cannot be reached"):
        reach(Home(tmp_path))
