"""/api over a home's records: pages, lineage, experts, deployments."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from moestro_flows.home import Home
from moestro_services.catalog import Catalog


def test_runs_are_listed_and_found_with_their_steps(admin: httpx.Client, built_home: Home) -> None:
    listed = admin.get("/api/runs").json()
    assert [run["id"] for run in listed] == ["20260102-030400-abcd"]
    found = admin.get("/api/runs/20260102").json()
    assert found == admin.get("/api/runs/latest").json()
    steps = admin.get("/api/runs/small/steps").json()
    assert [step["name"] for step in steps] == [step.name for step in Catalog(built_home).run().steps]
    assert admin.get("/api/runs", params={"after": listed[0]["id"]}).json() == []


def test_artifacts_are_paged_without_gaps(admin: httpx.Client) -> None:
    everything = admin.get("/api/artifacts").json()
    paged: list[Any] = []
    while page := admin.get(
        "/api/artifacts", params={"limit": 5} | ({"after": paged[-1]["fingerprint"]} if paged else {})
    ).json():
        assert len(page) <= 5
        paged += page
    assert paged == everything
    branches = admin.get("/api/artifacts", params={"stage": "branch"}).json()
    assert {item["stage"] for item in branches} == {"branch"}
    rest = admin.get("/api/artifacts", params={"stage": "branch", "after": branches[0]["fingerprint"]}).json()
    assert rest == branches[1:]


def test_an_artifact_comes_with_its_lineage(admin: httpx.Client) -> None:
    (mix,) = admin.get("/api/artifacts", params={"stage": "mix"}).json()
    detail = admin.get(f"/api/artifacts/{mix['fingerprint'][:10]}").json()
    assert detail["lineage"][0]["fingerprint"] == mix["fingerprint"]
    assert {item["stage"] for item in detail["lineage"]} == {"mix", "seed", "branch", "tokens", "corpus"}
    assert {item["stage"] for item in detail["used_by"]} == {"tune", "evaluate", "profile"}


def test_experts_are_those_of_the_profile(admin: httpx.Client) -> None:
    found = admin.get("/api/experts/mix").json()
    assert (found["num_layers"], found["num_experts"], found["num_experts_per_tok"]) == (2, 3, 2)
    prose = next(expert for expert in found["experts"] if expert["origin"] == "prose")
    assert (prose["preferred"], prose["shares"]) == ("prose", {"code": 0.2, "prose": 0.8})


def test_deployments_say_how_they_are_served(
    api: Any, admin: httpx.Client, deployed: Callable[..., str], fixed_server: Any, upstream: Any
) -> None:
    def states() -> dict[str, tuple[str, str]]:
        return {one["fingerprint"]: (one["state"], one["version"]) for one in admin.get("/api/deployments").json()}

    (listed,) = admin.get("/api/deployments").json()
    assert (listed["name"], listed["state"], listed["version"]) == ("assistant", "not served", "")
    api.servers["1"] = fixed_server(upstream)
    first, second = deployed("a"), deployed("b")
    admin.post("/api/models/assistant/versions", json={"deployment": first})
    api.wait_for({"1": "serving"})
    assert states() == {listed["fingerprint"]: ("not served", ""), first: ("serving", "1"), second: ("not served", "")}
    with admin.stream("POST", "/v1/completions", json={"model": "assistant", "prompt": "endless", "stream": True}):
        for number, fingerprint in (("2", second), ("3", deployed("c"))):
            admin.post("/api/models/assistant/versions", json={"deployment": fingerprint})
            api.wait_for({number: "serving"})
            admin.post("/api/models/assistant/promote", json={"version": number})
        api.wait_for({"1": "draining", "2": "serving"})
        assert (states()[first], states()[second]) == (("draining", "1"), ("serving", "2"))


@pytest.mark.parametrize(
    ("path", "status", "kind"),
    [
        ("/api/runs/nothing", 404, "InputError"),
        ("/api/runs/nothing/steps", 404, "InputError"),
        ("/api/artifacts/ffffffff", 404, "ArtifactError"),
        ("/api/artifacts/..%2F..", 400, "HTTPError"),
        ("/api/artifacts/%2e%2e", 400, "HTTPError"),
        ("/api/artifacts/%00", 400, "HTTPError"),
        ("/api/experts/seed", 404, "ArtifactError"),
        ("/api/runs?limit=0", 400, "HTTPError"),
        (f"/api/artifacts?after={'0' * 64}", 404, "ArtifactError"),
        ("/api/artifacts?after=..", 400, "HTTPError"),
    ],
)
def test_mistakes_are_worded(admin: httpx.Client, path: str, status: int, kind: str) -> None:
    response = admin.get(path)
    assert (response.status_code, response.json()["error"]["kind"]) == (status, kind)


def test_folders_are_not_read_over_http(admin: httpx.Client, built_home: Home) -> None:
    folder = Catalog(built_home).entry("mix").path
    for reference, status in (
        (str(folder), 400),
        (str(folder)[1:], 404),
        (str(folder).replace("/", "%2F"), 400),
        ("%2F" + folder.name, 400),
        (folder.name + "%2F", 404),
    ):
        assert admin.get(f"/api/artifacts/{reference}").status_code == status, reference
