"""Prefect's server: whether one that has an address answers, and what becomes of the ephemeral one.

The ephemeral server outlives a driver that was killed; the next run with the same home ends it.
"""

import os
from contextlib import suppress

import httpx
import psutil

from moestro.errors import ResourceError
from moestro_flows.home import Home

OWNER = "MOESTRO_PREFECT_SERVER_OF"
"""In a server's environment: the process that it was started for, and the home."""
MARK = "prefect.server"
STOP_SECONDS = 5
REACH_SECONDS = 10


def reach(home: Home) -> None:
    """Raise `ResourceError` if there is an address of a Prefect server in the environment and nobody answers there."""
    if home.prefect_url is None:
        return
    try:
        httpx.get(f"{home.prefect_url}/health", timeout=REACH_SECONDS)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ResourceError(
            f"The Prefect server {home.prefect_url} cannot be reached: {error}.",
            hint="Start it, or unset PREFECT_API_URL to use an ephemeral one.",
        ) from None


def sign_own(home: Home) -> None:
    """Let the server that Prefect starts for this process carry, from its first moment, whose it is. Call it before."""
    os.environ[OWNER] = f"{os.getpid()} {home.path}"


def end_orphans(home: Home) -> None:
    """End the servers that earlier runs with this home left behind. Call it while holding the home's lock."""
    orphans = [server for server in _servers() if _is_orphan(server, home)]
    for server in orphans:
        with suppress(psutil.NoSuchProcess):
            server.terminate()
    for server in psutil.wait_procs(orphans, timeout=STOP_SECONDS)[1]:
        with suppress(psutil.NoSuchProcess):
            server.kill()


def _servers() -> list[psutil.Process]:
    return [process for process in psutil.process_iter(["cmdline"]) if MARK in " ".join(process.info["cmdline"] or ())]


def _is_orphan(server: psutil.Process, home: Home) -> bool:
    """Whether a run with this home started it that is no longer its parent."""
    try:
        driver, _, path = server.environ().get(OWNER, "").partition(" ")
        return path == str(home.path) and server.ppid() != int(driver)
    except psutil.Error:  # it has ended, or is another user's
        return False
