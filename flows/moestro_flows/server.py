"""Prefect's ephemeral server outlives a driver that was killed; the next run ends the one its own home left behind."""

import json

import psutil

from moestro_flows.home import Home

NAME = "prefect_server.json"


def remember_server(home: Home) -> None:
    """Note the ephemeral server among this process's children, so that a later run can end it if we are killed."""
    servers = [child for child in psutil.Process().children() if "prefect.server" in " ".join(child.cmdline())]
    notes = [{"pid": server.pid, "created": server.create_time()} for server in servers]
    (home.path / NAME).write_text(json.dumps(notes))


def stop_stale_server(home: Home) -> None:
    """End the servers noted by an earlier run if its own process is gone: same pid, same start, now without parent."""
    path = home.path / NAME
    if not path.exists():
        return
    for note in json.loads(path.read_text()):
        if not psutil.pid_exists(note["pid"]):
            continue
        server = psutil.Process(note["pid"])
        orphaned = server.ppid() in (0, 1)
        if server.create_time() == note["created"] and orphaned:
            server.terminate()
    path.unlink()
