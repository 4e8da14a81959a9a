"""Keys at the door: what each scope opens, what a wrong one meets, and each key's own limits."""

from typing import Any

import openai
import pytest

from moestro_services.gateway.caller import Caller, Scope
from moestro_services.gateway.keys import KeyRing
from moestro_services.gateway.limits import Limits

Gateway = Any
"""`conftest.Gateway`."""
UNKNOWN = "mk-" + "x" * 43
ALLOWED = [
    ("GET", "/v1/models", {Scope.INFER}),
    ("POST", "/v1/completions", {Scope.INFER}),
    ("GET", "/v1", {Scope.INFER}),
    ("GET", "/api/runs", {Scope.READ}),
    ("HEAD", "/api", {Scope.READ}),
    ("GET", "/metrics", {Scope.READ}),
    ("POST", "/api/promote", set()),
    ("DELETE", "/api/deployments/1", set()),
    ("PUT", "/api/runs", set()),
    ("OPTIONS", "/api/runs", set()),
    ("GET", "/openapi.json", {Scope.READ, Scope.INFER}),
    ("POST", "/health", {Scope.READ, Scope.INFER}),
    ("GET", "/health/", {Scope.READ, Scope.INFER}),
    ("GET", "/", {Scope.READ, Scope.INFER}),
    ("GET", "/v1x", {Scope.READ, Scope.INFER}),
    ("GET", "/apis", {Scope.READ, Scope.INFER}),
    ("GET", "/API/runs", {Scope.READ, Scope.INFER}),
]


@pytest.mark.parametrize(("method", "path", "scopes"), ALLOWED)
def test_a_key_opens_what_its_scopes_say(gateway: Gateway, method: str, path: str, scopes: set[Scope]) -> None:
    for scope in Scope:
        answer = gateway.ask(method, path, headers=gateway.key(scope))
        wanted = 200 if scope in scopes | {Scope.ADMIN} else 403
        assert answer.status_code == wanted, (scope, answer.text)
    assert gateway.ask(method, path).status_code == 401
    assert gateway.inside.paths == [path] * (len(scopes) + 1)
    assert gateway.counted["scope"] == 2 - len(scopes)
    assert gateway.counted["no_key"] == 1


def test_probes_need_no_key(gateway: Gateway) -> None:
    for path in ("/health", "/ready"):
        assert gateway.ask("GET", path).status_code == 200
        assert gateway.ask("HEAD", path).status_code == 200
    assert gateway.inside.callers[0].scopes == frozenset()


def test_the_application_learns_who_asks(gateway: Gateway) -> None:
    headers = gateway.key(Scope.INFER, name="ci")
    gateway.ask("GET", "/v1/models", headers=headers)
    key = gateway.keys.list()[0]
    assert gateway.inside.callers == [Caller(key.id, key.scopes)]


WRONG = [
    "",
    "Bearer",
    "Basic abc",
    f"Bearer {UNKNOWN}",
    f"Bearer {UNKNOWN}, Bearer {UNKNOWN}",
    f"Bearer {UNKNOWN} {UNKNOWN}",
    f"bearer\t{UNKNOWN}",
    "Bearer " + "x" * 60_000,
    UNKNOWN,
]


@pytest.mark.parametrize("value", WRONG, ids=range(len(WRONG)))
def test_a_wrong_key_is_a_401_in_the_words_of_the_api(gateway: Gateway, value: str) -> None:
    gateway.key(Scope.ADMIN)
    answer = gateway.ask("POST", "/v1/completions", headers={"Authorization": value}, json={})
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert gateway.ask("GET", "/api/runs", headers={"Authorization": value}).json()["error"]["kind"]
    assert gateway.counted["wrong_key"] == 2
    assert gateway.inside.paths == []


def test_keys_take_effect_and_lose_it_while_the_gateway_runs(gateway: Gateway) -> None:
    client = openai.OpenAI(base_url=gateway.url + "/v1", api_key=UNKNOWN, max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="Incorrect API key"):
        client.models.list()
    key, secret = KeyRing(gateway.keys.path).create("late", [Scope.INFER])
    headers = {"Authorization": f"Bearer {secret}"}
    assert gateway.ask("GET", "/v1/models", headers=headers).status_code == 200
    KeyRing(gateway.keys.path).revoke(key.id)
    refused = gateway.ask("GET", "/v1/models", headers=headers)
    assert refused.status_code == 401
    assert "revoked" in refused.json()["error"]["message"]
    assert gateway.counted == {"wrong_key": 1, "revoked_key": 1}


def test_a_damaged_key_file_lets_nobody_in_and_heals(gateway: Gateway) -> None:
    headers = gateway.key(Scope.READ)
    content = gateway.keys.path.read_bytes()
    assert gateway.ask("GET", "/api/runs", headers=headers).status_code == 200
    gateway.keys.path.write_bytes(content[:-5])
    refused = gateway.ask("GET", "/api/runs", headers=headers)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    assert str(gateway.keys.path) not in refused.text
    gateway.keys.path.write_bytes(content)
    assert gateway.ask("GET", "/api/runs", headers=headers).status_code == 200


def test_limits_are_each_keys_own(gateway: Gateway) -> None:
    few = gateway.key(Scope.INFER, limits=Limits(requests_per_minute=2))
    many = gateway.key(Scope.INFER)
    assert [gateway.ask("GET", "/v1/models", headers=few).status_code for _ in range(4)] == [200, 200, 429, 429]
    assert gateway.ask("GET", "/v1/models", headers=many).status_code == 200
    over = gateway.ask("GET", "/v1/models", headers=few)
    assert 1 <= int(over.headers["retry-after"]) <= 30
    assert over.json()["error"]["code"] == "rate_limit_exceeded"
    secret = few["Authorization"].removeprefix("Bearer ")
    client = openai.OpenAI(base_url=gateway.url + "/v1", api_key=secret, max_retries=0)
    with pytest.raises(openai.RateLimitError, match="2 requests per minute"):
        client.models.list()


def test_tokens_are_charged_when_they_are_known(gateway: Gateway) -> None:
    headers = gateway.key(Scope.INFER, limits=Limits(tokens_per_minute=100))
    assert gateway.ask("POST", "/v1/completions", headers=headers, json={}).status_code == 200
    gateway.inside.spend[0](150)
    over = gateway.ask("POST", "/v1/completions", headers=headers, json={})
    assert over.status_code == 429
    assert int(over.headers["retry-after"]) >= 30
    assert gateway.counted == {"tokens_per_minute": 1}
