"""/api/models and /api/audit: what may be read, what changes, and who may change it."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest

REGISTER = "/api/models/assistant/versions"
UNCOMPARED: dict[str, Any] = {
    "latency": {"thresholds": {"max_ratio": None}},
    "memory": {"thresholds": {"max_ratio": None}},
}


def test_a_deployment_becomes_a_version_and_gets_traffic(
    api: Any, admin: httpx.Client, deployed: Callable[..., str]
) -> None:
    made = admin.post(REGISTER, json={"deployment": deployed("a")[:12]})
    assert (made.status_code, made.headers["location"]) == (201, "/api/models/assistant")
    assert made.json()["aliases"] == {"champion": "1"}
    admin.post(REGISTER, json={"deployment": deployed("b")})
    canary = admin.post("/api/models/assistant/promote", json={"share": 0.25}).json()
    assert (canary["version"], canary["canary_share"]) == ("2", 0.25)
    done = admin.post("/api/models/assistant/promote", json={"version": "2"}).json()
    assert (done["aliases"], done["canary_share"]) == ({"champion": "2", "previous": "1"}, 0.0)
    back = admin.post("/api/models/assistant/rollback").json()
    assert back["aliases"]["champion"] == "1"
    assert {entry.actor for entry in api.audit} == {api.keys["admin"].id}


def test_a_rollback_with_nothing_to_go_back_to_is_a_conflict(admin: httpx.Client, deployment_fingerprint: str) -> None:
    admin.post(REGISTER, json={"deployment": deployment_fingerprint})
    refused = admin.post("/api/models/assistant/rollback")
    error = refused.json()["error"]
    assert (refused.status_code, error["kind"]) == (409, "ConflictError")
    assert "moestro promote" in error["hint"]
    assert "no version to go back to" in error["message"]
    assert admin.post("/api/models/nobody/rollback").status_code == 404


def test_models_come_with_what_answers_for_them(
    api: Any, admin: httpx.Client, deployed: Callable[..., str], fixed_server: Any, upstream: Any
) -> None:
    api.servers |= {"1": fixed_server(upstream), "2": fixed_server(refusals=1)}
    fingerprints = [deployed("a"), deployed("b")]
    for fingerprint in fingerprints:
        admin.post(REGISTER, json={"deployment": fingerprint})
    api.wait_for({"1": "serving", "2": "lost"})
    with admin.stream("POST", "/v1/completions", json={"model": "assistant", "prompt": "endless", "stream": True}):
        (model,) = admin.get("/api/models").json()
        assert model == admin.get("/api/models/assistant").json()
    assert [(one["aliases"], one["fingerprint"]) for one in model["versions"]] == [
        (["challenger"], fingerprints[1]),
        (["champion"], fingerprints[0]),
    ]
    assert [one["replicas"] for one in model["versions"]] == [
        [{"state": "lost", "in_flight": 0, "restarts": 0, "reason": "No memory."}],
        [{"state": "serving", "in_flight": 1, "restarts": 0, "reason": ""}],
    ]


def test_a_gate_refuses_unless_it_is_forced(admin: httpx.Client, deployed: Callable[..., str]) -> None:
    for letter, loss in (("a", 2.1), ("b", 2.4)):
        evidence = {"figures": {"held_out_loss": {"code": loss}}, "evidence": {"text": {"code": "digest"}}}
        gates = UNCOMPARED | {
            "quality": {"thresholds": {"max_loss_increase": 0.1, "max_accuracy_drop": None}} | evidence
        }
        admin.post(REGISTER, json={"deployment": deployed(letter, gates=gates)})
    refused = admin.post("/api/models/assistant/promote", json={"version": "2"})
    assert refused.status_code == 409
    assert refused.json()["error"]["kind"] == "GateError"
    assert "rose by 0.3 nats per token from the champion's 2.1 to 2.4" in refused.json()["error"]["message"]
    forced = admin.post("/api/models/assistant/promote", json={"version": "2", "force": "measured elsewhere"}).json()
    assert forced["forced"] == "measured elsewhere"
    (words,) = forced["refused"]
    assert words in refused.json()["error"]["message"]


def test_only_a_version_without_an_alias_is_deleted(admin: httpx.Client, deployed: Callable[..., str]) -> None:
    for letter in "abc":
        admin.post(REGISTER, json={"deployment": deployed(letter)})
    assert admin.delete(f"{REGISTER}/1").status_code == 409
    assert admin.delete(f"{REGISTER}/2").status_code == 204
    assert admin.delete(f"{REGISTER}/2").status_code == 404
    assert [one["version"] for one in admin.get("/api/models/assistant").json()["versions"]] == ["3", "1"]


CHANGES = [
    ("POST", REGISTER, {"deployment": "ffff"}),
    ("POST", "/api/models/assistant/promote", {}),
    ("POST", "/api/models/assistant/rollback", {}),
    ("DELETE", f"{REGISTER}/1", None),
    ("POST", "/api/lifecycles", {"config": "small"}),
    ("DELETE", "/api/lifecycles/20260102-030400-000001", None),
    ("GET", "/api/audit", None),
]


@pytest.mark.parametrize(("method", "path", "body"), CHANGES)
def test_changes_and_the_audit_are_for_administrators(
    api: Any, bearing: Callable[[str], httpx.Client], method: str, path: str, body: Any
) -> None:
    api.configured()
    for word in ("read", "infer"):
        answer = bearing(word).request(method, path, json=body)
        assert (answer.status_code, answer.json()["error"]["kind"]) == (403, "HTTPError")
    assert api.audit == []
    assert bearing("admin").request(method, path, json=body).status_code != 403


def test_the_audit_tells_who_changed_what(admin: httpx.Client, deployment_fingerprint: str) -> None:
    admin.post(REGISTER, json={"deployment": deployment_fingerprint})
    admin.post("/api/models/assistant/promote", json={"version": "1", "force": "measured elsewhere"})
    first, second = admin.get("/api/audit").json()
    assert [(entry["action"], entry["target"]) for entry in (first, second)] == [
        ("promote", "assistant"),
        ("register", "assistant"),
    ]
    assert (first["details"]["version"], first["details"]["force"]) == ("1", "measured elsewhere")
    assert len(admin.get("/api/audit", params={"limit": 1}).json()) == 1


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/api/models/nothing", None, 404),
        ("GET", "/api/models/..%2f..%2fetc", None, 400),
        ("POST", REGISTER, {"deployment": "ffffffff"}, 404),
        ("POST", REGISTER, {"deployment": "../../../etc/passwd"}, 400),
        ("POST", REGISTER, {"deployment": "mix"}, 400),
        ("POST", REGISTER, {}, 400),
        ("POST", "/api/models/assistant/promote", {"share": 1.0}, 400),
        ("POST", "/api/models/assistant/promote", {"share": "NaN"}, 400),
        ("POST", "/api/models/assistant/promote", {"version": "newest"}, 400),
        ("POST", "/api/models/assistant/promote", {"unknown": 1}, 400),
        ("POST", "/api/models/assistant/promote", {}, 404),
        ("DELETE", f"{REGISTER}/champion", None, 400),
        ("PUT", "/api/models/assistant", {}, 405),
    ],
)
def test_mistakes_are_refused(admin: httpx.Client, method: str, path: str, body: Any, status: int) -> None:
    answer = admin.request(method, path, json=body)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_a_deployment_of_another_model_is_no_version(admin: httpx.Client, deployment_fingerprint: str) -> None:
    answer = admin.post("/api/models/other/versions", json={"deployment": deployment_fingerprint})
    assert (answer.status_code, answer.json()["error"]["hint"]) == (404, "POST it to /api/models/assistant/versions.")


def test_what_is_no_deployment_is_no_version(api: Any, admin: httpx.Client) -> None:
    mix = admin.get("/api/artifacts/mix").json()["record"]["fingerprint"]
    answer = admin.post(REGISTER, json={"deployment": mix})
    assert (answer.status_code, answer.json()["error"]["kind"]) == (404, "ArtifactError")


@pytest.mark.parametrize(
    "body",
    [
        b'{"\\ud800": 1}',
        b'{"deployment": "\\ud800"}',
        b'{"deployment": "ffff", "more": NaN}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"",
    ],
    ids=["lone surrogate as a name", "as a value", "NaN", "no UTF-8", "deep list", "deep object", "empty"],
)
def test_bodies_that_are_no_requests_are_refused(admin: httpx.Client, body: bytes) -> None:
    for path in (REGISTER, "/api/models/assistant/promote", "/api/lifecycles"):
        answer = admin.post(path, content=body, headers={"Content-Type": "application/json"})
        assert (answer.status_code, bool(answer.json()["error"]["message"])) == (400, True)
