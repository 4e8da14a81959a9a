"""The gateway before a real HTTP server: bytes pass through, refusals are worded, clients that leave cancel."""

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from moestro_flows.home import Home
from moestro_services.gateway.app import Parts, create_app
from moestro_services.gateway.door import Door
from moestro_services.gateway.errors import Refused
from moestro_services.gateway.limits import Limits
from moestro_services.gateway.listening import listen, serving

ASK = {"model": "assistant", "prompt": "12 + 7 =", "max_tokens": 4}


@pytest.fixture
def base_url(tmp_path: Any, fleet: Any) -> Iterator[str]:
    def door(app: Any, traffic: Any) -> Any:
        return Door(app, keys=None, limits=Limits(), counted=traffic.refused)

    app = create_app(Parts(home=Home(tmp_path), fleet=fleet, wraps=(door,), max_body_bytes=10_000))
    with serving(app, listen("127.0.0.1", 0)) as url:
        yield url


def post(base_url: str, body: Any, path: str = "/v1/completions") -> httpx.Response:
    return httpx.post(base_url + path, json=body, timeout=30)


def test_a_completion_is_the_upstreams_own_bytes(base_url: str, upstream: Any) -> None:
    raw = b'{ "prompt":"12 + 7 =",  "model":"assistant", "vllm_xargs":{"a":1} }'
    response = httpx.post(
        base_url + "/v1/completions",
        content=raw,
        headers={"Content-Type": "application/json", "X-Request-Id": "r1", "Cookie": "c=1"},
    )
    assert response.status_code == 200
    assert response.content == upstream.answer
    assert "x-secret" not in response.headers
    path, headers, body = upstream.seen[0]
    assert (path, body) == ("/v1/completions", raw)
    assert headers["x-request-id"] == "r1"
    assert "cookie" not in headers


def test_a_stream_passes_unchanged(base_url: str, upstream: Any) -> None:
    with httpx.stream("POST", base_url + "/v1/completions", json=ASK | {"stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        received = b"".join(response.iter_bytes())
    assert received == b"".join(upstream.events) + b"data: [DONE]\n\n"


def test_a_streams_first_event_arrives_before_its_end(base_url: str, upstream: Any) -> None:
    with httpx.stream("POST", base_url + "/v1/completions", json=ASK | {"prompt": "endless", "stream": True}) as answer:
        arriving = answer.iter_bytes()  # kept: to drop it would end the stream
        assert next(arriving).startswith(upstream.events[0])
        assert not upstream.left.is_set()


def test_a_missing_chat_template_stays_a_400(base_url: str) -> None:
    response = post(base_url, {"model": "assistant", "messages": []}, "/v1/chat/completions")
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "no chat template"


def test_an_unknown_model_is_an_openai_404(base_url: str, upstream: Any) -> None:
    response = post(base_url, ASK | {"model": "gpt-5"})
    assert response.status_code == 404
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "gpt-5" in error["message"]
    assert upstream.seen == []


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b'{"prompt": "x"}',
        b'{"model": 3}',
        b"[" * 9000,
        b"\xff\xfe",
        b'{"model": "assistant", "n": NaN}',
        b'{"model": "assistant", "n": -1e999}',
    ],
)
def test_a_request_that_names_no_model_is_a_400(base_url: str, body: bytes) -> None:
    response = httpx.post(base_url + "/v1/completions", content=body)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_large_body_is_refused_whether_declared_or_not(base_url: str, upstream: Any) -> None:
    def chunks() -> Iterator[bytes]:
        yield b" " * 6000
        yield b" " * 6000

    for content in (b" " * 20_000, chunks()):
        response = httpx.post(base_url + "/v1/completions", content=content)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"
    assert upstream.seen == []


def test_an_upstream_that_is_down_is_a_503_with_retry_after(base_url: str, models: Any, fleet: Any) -> None:
    models.servers["1"].may_start.clear()
    models.servers["1"].gone.set()
    assert fleet.wait_for(lambda fleet: not all(fleet.ready.values()), 30)
    response = post(base_url, ASK)
    ready = httpx.get(base_url + "/ready")
    for refused in (response, ready):
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) > 0
    assert response.json()["error"]["code"] == "model_unavailable"
    assert ready.json()["models"] == {"assistant": False}
    assert ready.json()["versions"][0]["state"] in ("lost", "starting")
    assert httpx.get(base_url + "/health").json() == {"status": "ok"}
    models.servers["1"].may_start.set()
    assert fleet.wait_for(lambda fleet: all(fleet.ready.values()), 30)
    assert post(base_url, ASK).status_code == 200
    assert httpx.get(base_url + "/ready").json()["versions"][0]["restarts"] == 1


def test_a_port_where_nobody_listens_is_a_503(base_url: str, models: Any, upstream: Any, fleet: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        upstream.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        models.servers["1"].gone.set()
        assert fleet.wait_for(lambda fleet: fleet.replicas()[0].restarts == 1 and all(fleet.ready.values()), 30)
        response = post(base_url, ASK)
    assert (response.status_code, response.headers["Retry-After"]) == (503, "5")


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_dies_before_it_answers_is_a_clean_503(base_url: str, stream: bool) -> None:
    response = post(base_url, ASK | {"prompt": "die", "stream": stream})
    assert (response.status_code, response.headers["Retry-After"]) == (503, "5")
    assert response.json()["error"]["type"] == "server_error"


def test_another_servers_answer_never_reaches_the_client(base_url: str, upstream: Any, fleet: Any) -> None:
    upstream.api_key = "another process has the port"
    response = post(base_url, ASK)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "model_unavailable"
    assert fleet.wait_for(lambda fleet: fleet.replicas()[0].restarts == 1 and all(fleet.ready.values()), 30)
    assert post(base_url, ASK).status_code == 200


def test_an_engine_that_is_dead_is_a_503_and_started_again(base_url: str, upstream: Any, fleet: Any) -> None:
    failed = post(base_url, ASK | {"prompt": "fail"})
    assert (failed.status_code, failed.json()["error"]["message"]) == (500, "no")
    upstream.well = False
    assert post(base_url, ASK | {"prompt": "fail"}).status_code == 503
    assert fleet.wait_for(lambda fleet: fleet.replicas()[0].restarts == 1, 30)


def test_a_client_that_leaves_a_stream_cancels_it(base_url: str, upstream: Any) -> None:
    body = ASK | {"prompt": "endless", "stream": True}
    with httpx.stream("POST", base_url + "/v1/completions", json=body) as response:
        next(response.iter_bytes())
        assert upstream.began.wait(10)
    assert upstream.left.wait(10)


def test_a_client_that_leaves_before_the_answer_cancels_it(base_url: str, upstream: Any) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(base_url + "/v1/completions", json=ASK | {"prompt": "wait"}, timeout=httpx.Timeout(10, read=0.5))
    assert upstream.began.is_set()
    assert upstream.left.wait(10)


def test_an_upstream_lost_midway_is_noticed(base_url: str) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        post(base_url, ASK | {"prompt": "break"})
    client = openai.OpenAI(base_url=base_url + "/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.APIError, match="cannot be reached"):
        list(client.completions.create(model="assistant", prompt="break", stream=True))


def test_the_openai_client_sees_the_deployment(base_url: str) -> None:
    client = openai.OpenAI(base_url=base_url + "/v1", api_key="none")
    listed = client.models.list().data
    assert [card.id for card in listed] == ["assistant", "assistant@champion", "assistant@1"]
    assert listed[0].model_dump()["root"] == "compress/" + "c" * 64
    assert client.models.retrieve("assistant").id == "assistant"
    assert client.models.retrieve("assistant@champion").id == "assistant@champion"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_metrics_count_by_route_model_version_and_status(base_url: str) -> None:
    post(base_url, ASK)
    post(base_url, ASK | {"model": "other"})
    post(base_url, ASK | {"stream": True})
    text = httpx.get(base_url + "/metrics").text
    counter = 'moestro_gateway_requests_total{model="%s",route="/v1/completions",status="%d",version="%s"} %.1f'
    assert counter % ("assistant", 200, "1", 2) in text
    assert counter % ("", 404, "", 1) in text
    assert 'moestro_gateway_model_up{model="assistant",version="1"} 1.0' in text
    assert 'moestro_gateway_champion_up{model="assistant"} 1.0' in text
    assert 'moestro_gateway_model_restarts_total{model="assistant",version="1"} 0.0' in text
    assert 'moestro_gateway_tokens_total{kind="prompt",model="assistant",version="1"} 5.0' in text
    assert 'moestro_gateway_tokens_total{kind="completion",model="assistant",version="1"} 5.0' in text
    assert 'moestro_gateway_refusals_total{reason="model_not_found"} 1.0' in text


def test_a_streams_usage_is_read_from_its_last_event(base_url: str) -> None:
    body = ASK | {"stream": True, "stream_options": {"include_usage": True}}
    assert b'"usage"' in post(base_url, body).content
    text = httpx.get(base_url + "/metrics").text
    assert 'moestro_gateway_tokens_total{kind="completion",model="assistant",version="1"} 2.0' in text


def test_a_version_or_alias_is_asked_for_by_name(base_url: str, upstream: Any) -> None:
    for name in ("assistant@champion", "assistant@1"):
        assert post(base_url, ASK | {"model": name}).status_code == 200
    assert [json.loads(body)["model"] for _, _, body in upstream.seen] == ["assistant"] * 2
    assert json.loads(upstream.seen[0][2]) == ASK
    for name in ("assistant@challenger", "assistant@2", "assistant@9", "assistant@", "@"):
        refused = post(base_url, ASK | {"model": name})
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
    assert "is registered but not served" in post(base_url, ASK | {"model": "assistant@2"}).json()["error"]["message"]


class Hooks:
    """Adds a salt to prompts that ask for it, refuses some, and keeps what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, str, bytes, bytes | None]] = []

    def prepare(self, _caller: Any, deployment: Any, body: dict[str, Any]) -> dict[str, Any]:
        if body["prompt"] == "forbidden":
            raise Refused(403, "Not for you.", code="insufficient_scope")
        return body | {"cache_salt": deployment.label} if body["prompt"] == "salted" else body

    def answered(self, deployment: Any, path: str, request: bytes, answer: bytes | None) -> None:
        self.heard.append((deployment.label, path, request, answer))


def test_hooks_change_refuse_and_hear(tmp_path: Any, fleet: Any, upstream: Any) -> None:
    hooks = Hooks()
    parts = Parts(home=Home(tmp_path), fleet=fleet, preparing=[hooks], answered=[hooks])
    with serving(create_app(parts), listen("127.0.0.1", 0)) as url:
        assert post(url, ASK | {"prompt": "forbidden"}).status_code == 403
        assert post(url, ASK | {"prompt": "salted"}).status_code == 200
        assert post(url, ASK | {"stream": True}).status_code == 200
    assert [json.loads(body).get("cache_salt") for _, _, body in upstream.seen] == ["assistant@1", None]
    assert [(label, answer) for label, _, _, answer in hooks.heard] == [
        ("assistant@1", upstream.answer),
        ("assistant@1", None),
    ]
    assert json.loads(hooks.heard[0][2])["cache_salt"] == "assistant@1"
    assert fleet.replicas()[0].in_flight == 0


def test_many_requests_at_once(base_url: str, upstream: Any) -> None:
    answers: list[bytes] = []

    def ask() -> None:
        answers.append(post(base_url, ASK).content)

    threads = [threading.Thread(target=ask) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [upstream.answer] * 24


def test_another_host_name_is_refused_on_loopback(base_url: str) -> None:
    port = urlsplit(base_url).port
    refused = httpx.get(base_url + "/v1/models", headers={"Host": f"evil.example:{port}"})
    assert refused.status_code == 400
    for name in ("localhost", "127.0.0.1", "[::1]"):
        assert httpx.get(base_url + "/v1/models", headers={"Host": f"{name}:{port}"}).status_code == 200


def test_unknown_paths_are_refused_in_the_words_of_their_api(base_url: str) -> None:
    assert httpx.get(base_url + "/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    assert httpx.get(base_url + "/nothing").json()["error"]["kind"] == "HTTPError"
    refused = httpx.get(base_url + "/v1/completions")
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")


def test_the_schema_lists_every_route_and_loads_nothing_from_elsewhere(base_url: str) -> None:
    paths = json.loads(httpx.get(base_url + "/openapi.json").content)["paths"]
    assert {"/v1/models", "/v1/completions", "/v1/chat/completions", "/api/runs", "/metrics"} <= set(paths)
    assert httpx.get(base_url + "/docs").status_code == 404
