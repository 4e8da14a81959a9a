"""Lifecycles that are started over the API: by name alone, one at a time, known to the next gateway too."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from moestro.artifacts import exclusive
from moestro.config import load_lifecycle
from moestro_services.gateway.lifecycles_feed import Feeds
from moestro_services.gateway.lifecycles_process import ProcessMark
from moestro_services.gateway.lifecycles_runs import Lifecycles


def finished(admin: httpx.Client, identity: str) -> dict[str, Any]:
    """Follow a lifecycle to its end, and say how it stands then."""
    admin.get(f"/api/lifecycles/{identity}/events")
    found: dict[str, Any] = admin.get(f"/api/lifecycles/{identity}").json()
    return found


def start(admin: httpx.Client, **more: Any) -> dict[str, Any]:
    answer = admin.post("/api/lifecycles", json={"config": "small", **more})
    assert answer.status_code == 202, answer.text
    made: dict[str, Any] = answer.json()
    assert answer.headers["location"] == f"/api/lifecycles/{made['id']}"
    return made


def test_configs_are_those_of_the_operator(api: Any, admin: httpx.Client) -> None:
    assert admin.get("/api/configs").json() == []
    api.configured()
    api.configured("broken", seed=3)
    (api.home.configs / "NOT A NAME.yaml").write_text("{}")
    broken, small = admin.get("/api/configs").json()
    assert (small["name"], small["description"]) == ("small", "A small one, for tests.")
    assert small["domains"] == ["code", "prose"]
    assert (broken["name"], "seed" in broken["error"]) == ("broken", True)
    assert admin.get("/api/configs/small").json()["config"]["branch"]["training"]["steps"] == 20
    assert admin.get("/api/configs/broken").status_code == 400
    assert admin.get("/api/configs/other").status_code == 404
    assert admin.get("/api/configs/..%2Fprogram").status_code == 400


def test_a_lifecycle_runs_to_its_end(api: Any, admin: httpx.Client) -> None:
    api.configured()
    made = start(admin)
    assert made["state"] in {"starting", "running", "completed"}
    ended = finished(admin, made["id"])
    assert (ended["state"], ended["config"], ended["actor"], ended["error"]) == (
        "completed",
        "small",
        api.keys["admin"].id,
        None,
    )
    assert [(step["name"], step["status"]) for step in ended["steps"]] == [
        ("corpus code", "completed"),
        ("seed", "reused"),
    ]
    assert admin.get(f"/api/runs/{ended['run']}").json()["status"] == "completed"
    (listed,) = admin.get("/api/lifecycles").json()
    assert listed == {key: value for key, value in ended.items() if key not in {"steps", "error"}}
    (entry,) = api.audit
    assert (entry.actor, entry.action, entry.target) == (ended["actor"], "lifecycle.start", made["id"])
    assert entry.details == {"config": "small", "changes": {}}


def test_a_change_is_for_that_run_alone(api: Any, admin: httpx.Client) -> None:
    api.configured()
    changes = {"tune": None, "branch.training.steps": 5, "data.domains.0.source.max_bytes": 5000}
    made = start(admin, changes=changes)
    assert made["changes"] == changes
    ran = load_lifecycle(api.home.lifecycles / made["id"] / "config.yaml")
    assert ran.tune is None
    assert ran.branch.training.steps == 5
    assert ran.data.domains[0].source.max_bytes == 5000
    assert ran.data.domains[1].source.paths == ("corpora/*.txt",)
    assert load_lifecycle(api.home.configs / "small.yaml").tune is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"data.domains.1.source.paths": ["/etc/*"]},
        {"data.domains.1.source": {"type": "files", "paths": ["/etc/passwd"]}},
        {"seed": {"type": "import", "path": "/etc"}},
        {"branch.existing": {"code": {"path": "package:other"}}},
        {"rl": {"task": {"name": "chain_sum"}, "rewards": [{"type": "function", "path": "os:system"}]}},
        {"rl": {"type": "dpo", "pairs": "/etc/passwd"}},
        {"rl": {"task": {"name": "spell_backward", "arguments": {"data_file": "../../../etc/passwd"}}}},
        {"unknown": 1},
        {"seed.unknown.steps": 1},
        {"data.domains.7.source.max_bytes": 5000},
        {"../config": 1},
        {"tune.training.steps": -1},
        {"name": "../../x"},
        {"name": "\ud800"},
        {"\ud800": 1},
        {"a.\ud800": 1},
        {"tune.training.steps": float("nan")},
    ],
)
def test_no_request_reaches_files_or_code(api: Any, admin: httpx.Client, changes: dict[str, Any]) -> None:
    api.configured()
    body = json.dumps({"config": "small", "changes": changes})
    answer = admin.post("/api/lifecycles", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert admin.get("/api/lifecycles").json() == []
    assert api.audit == []


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("other", 404),
        ("small.yaml", 404),
        ("../small", 400),
        ("/etc/passwd", 400),
        ("$(touch x)", 400),
        ("a\u0000", 400),
    ],
)
def test_a_config_is_one_of_the_list(api: Any, admin: httpx.Client, name: str, status: int) -> None:
    api.configured()
    assert admin.post("/api/lifecycles", json={"config": name}).status_code == status


def test_one_at_a_time(api: Any, admin: httpx.Client) -> None:
    api.configured()
    api.hold()
    made = start(admin)
    again = admin.post("/api/lifecycles", json={"config": "small"})
    assert (again.status_code, again.json()["error"]["kind"]) == (409, "BusyError")
    assert made["id"] in again.json()["error"]["message"]
    api.order("end")
    assert finished(admin, made["id"])["state"] == "completed"
    (api.home.path / "orders").unlink()
    with exclusive(api.home.lock, what="The home"):
        assert admin.post("/api/lifecycles", json={"config": "small"}).status_code == 409
    assert start(admin)["id"] > made["id"]


def test_a_lifecycle_that_fails_says_why(api: Any, admin: httpx.Client) -> None:
    api.configured()
    api.hold()
    made = start(admin)
    api.order("progress fail")
    ended = finished(admin, made["id"])
    assert (ended["state"], ended["error"]) == (
        "failed",
        {"kind": "InputError", "message": "no text", "hint": "Give some."},
    )
    assert [(step["status"], step["message"]) for step in ended["steps"]] == [("failed", "no text"), ("waiting", "")]
    assert ended["steps"][0]["figures"] == {"loss": None}


def test_one_that_is_refused_before_it_begins_has_failed(api: Any, admin: httpx.Client) -> None:
    api.configured()
    (api.home.path / "refuse").touch()
    ended = finished(admin, start(admin)["id"])
    assert (ended["state"], ended["run"], ended["steps"]) == ("failed", "", [])
    assert ended["error"]["message"] == "no such thing"


def test_stopping_is_ctrl_c(api: Any, admin: httpx.Client) -> None:
    api.configured()
    api.hold()
    made = start(admin)
    api.order("progress")
    stopped = admin.delete(f"/api/lifecycles/{made['id']}")
    assert (stopped.status_code, stopped.json()["state"] in {"stopping", "cancelled"}) == (202, True)
    ended = finished(admin, made["id"])
    assert (ended["state"], ended["steps"][0]["status"]) == ("cancelled", "cancelled")
    again = admin.delete(f"/api/lifecycles/{made['id']}")
    assert (again.status_code, again.json()["state"]) == (200, "cancelled")
    assert api.audit[0].action == "lifecycle.stop"


def test_one_that_was_killed_is_lost(api: Any, admin: httpx.Client) -> None:
    api.configured()
    api.hold()
    made = start(admin)
    api.order("progress")
    os.kill(api.runs.process(made["id"]).pid, signal.SIGKILL)
    ended = finished(admin, made["id"])
    assert (ended["state"], ended["steps"][0]["status"]) == ("lost", "cancelled")


GATEWAY = """
import sys
from pathlib import Path
from moestro.config import load_lifecycle
from moestro_flows.home import Home
from moestro_services.gateway.lifecycles_runs import Lifecycles

home = Home(Path(sys.argv[1]))
config = load_lifecycle(home.configs / "small.yaml")
runs = Lifecycles(home, command=sys.argv[2:])
print(runs.start("small", config, {}, actor="key-1", audited=lambda _: None).id, flush=True)
sys.stdin.read()
"""


def test_a_lifecycle_outlives_the_gateway_and_the_next_one_stops_it(api: Any, admin: httpx.Client) -> None:
    """The gateway that started it is killed with all of its process group, as a terminal or an init system does."""
    api.configured()
    api.hold()
    gateway = subprocess.Popen(
        [sys.executable, "-c", GATEWAY, str(api.home.path), *api.runs.command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert gateway.stdout is not None
    identity = gateway.stdout.readline().strip()
    os.killpg(gateway.pid, signal.SIGKILL)
    gateway.communicate()
    api.order("progress")
    successor = Lifecycles(api.home)
    assert successor.detail(identity).state == "running"
    assert admin.post("/api/lifecycles", json={"config": "small"}).status_code == 409
    assert successor.stop(identity)
    assert finished(admin, identity)["state"] == "cancelled"


def test_a_number_that_another_process_has_now_is_not_signalled(api: Any, admin: httpx.Client) -> None:
    api.configured()
    made = start(admin)
    finished(admin, made["id"])
    path = api.home.lifecycles / made["id"] / "lifecycle.json"
    told = json.loads(path.read_text())
    told["process"]["pid"] = os.getpid()  # SIGINT would end this test
    path.write_text(json.dumps(told))
    assert admin.delete(f"/api/lifecycles/{made['id']}").status_code == 200
    assert admin.get(f"/api/lifecycles/{made['id']}").json()["state"] == "completed"
    assert ProcessMark.of(os.getpid()).running()
    assert not ProcessMark.of(os.getpid()).model_copy(update={"boot": "another"}).running()
    with pytest.raises(ProcessLookupError):
        ProcessMark.of(2**22)


def test_pages_go_on_after_the_last_id(api: Any, admin: httpx.Client) -> None:
    api.configured()
    ids = []
    for _ in range(3):
        ids.append(start(admin)["id"])
        finished(admin, ids[-1])
    expected = sorted(ids, reverse=True)
    first = admin.get("/api/lifecycles", params={"limit": 2}).json()
    assert [one["id"] for one in first] == expected[:2]
    rest = admin.get("/api/lifecycles", params={"after": expected[1]}).json()
    assert [one["id"] for one in rest] == expected[2:]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/api/lifecycles/20260102-030400-000001", 404),
        ("/api/lifecycles/20260102-030400-000001/events", 404),
        ("/api/lifecycles/..%2F..%2Fruns", 400),
        ("/api/lifecycles/start.lock", 400),
        ("/api/lifecycles?after=..", 400),
    ],
)
def test_what_is_not_there_is_not_found(api: Any, admin: httpx.Client, path: str, status: int) -> None:
    (api.home.lifecycles / "20260102-030400-000001").mkdir(parents=True)  # one whose start did not get far
    assert admin.get(path).status_code == status


def test_the_written_config_is_the_one_that_was_asked_for(api: Any, admin: httpx.Client, tmp_path: Path) -> None:
    api.configured()
    written = api.home.lifecycles / start(admin)["id"] / "config.yaml"
    assert load_lifecycle(written) == load_lifecycle(api.home.configs / "small.yaml")
    assert yaml.safe_load(written.read_text())["name"] == "small"
    assert written.parent.stat().st_mode & 0o077 == 0
    assert Feeds(api.runs).followers == 0
