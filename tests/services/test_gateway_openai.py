"""The `openai` client gets from the gateway what it gets from vLLM itself: values, streams, errors."""

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from moestro.inference.server import ServerConfig, VllmServer
from moestro_flows.home import Home
from moestro_services.gateway.assembly import Policy
from moestro_services.gateway.caller import Scope
from moestro_services.gateway.keys import KeyRing
from moestro_services.gateway.launch import Address, gateway
from moestro_services.gateway_bench.hosted import Given, Standing

OWN = {"id", "created"}
"""What is another in every answer."""
ASK = {"model": "tiny", "prompt": "Question: What is 12", "max_tokens": 6, "temperature": 0}
MESSAGES = [{"role": "system", "content": "Answer."}, {"role": "user", "content": "What is 12 + 7?"}]
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
CHAT = {"model": "tiny", "messages": MESSAGES, "max_tokens": 6, "temperature": 0}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_mixtral: Callable[..., None]) -> Path:
    folder = tmp_path_factory.mktemp("openai") / "model"
    tiny_mixtral(folder, seed=0, chat_template=TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def clients(checkpoint: Path) -> Iterator[tuple[openai.OpenAI, openai.OpenAI]]:
    """One that asks vLLM, and one that asks the gateway before the same vLLM."""
    home = Home(checkpoint.parent / "home")
    home.logs.mkdir(parents=True)
    keys = KeyRing.of(home)
    _, secret = keys.create("test", {Scope.INFER})
    config = ServerConfig(name="tiny", max_model_len=128, fingerprint="tiny@1", tool_call_parser="hermes")
    with VllmServer(checkpoint, config, log=home.logs / "vllm.log") as server:
        server.start()
        source = Given(home, "tiny", Standing(server.url, server.api_key))
        with gateway(home, source, Address(), say=lambda _: None, policy=Policy(keys=keys)) as running:
            running.wait_until_ready()
            yield _client(server.url, server.api_key), _client(running.url, secret)


def _client(url: str, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=120)


def plain(answer: Any) -> Any:
    return {name: value for name, value in answer.model_dump().items() if name not in OWN}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"logprobs": 3, "echo": True},
        {"n": 3, "temperature": 1.0, "seed": 7, "logprobs": 0},
        {"stop": ["12", "\n"]},
        {"prompt": ["Question", "Answer: 1"]},
        {"prompt": [5, 6, 7, 8]},
        {"extra_body": {"return_token_ids": True, "min_tokens": 4, "ignore_eos": True}},
    ],
    ids=str,
)
def test_completions_are_the_same(clients: tuple[openai.OpenAI, openai.OpenAI], more: dict[str, Any]) -> None:
    direct, through = (plain(client.completions.create(**(ASK | more))) for client in clients)
    assert through == direct
    assert through["system_fingerprint"] == "tiny@1"


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"logprobs": True, "top_logprobs": 2},
        {"n": 2, "temperature": 0.8, "seed": 3},
        {"tools": [TOOL], "tool_choice": "none"},
        {"tools": [TOOL]},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "add"}}, "max_tokens": 16},
        {"response_format": {"type": "json_object"}},
    ],
    ids=str,
)
def test_chats_are_the_same(clients: tuple[openai.OpenAI, openai.OpenAI], more: dict[str, Any]) -> None:
    direct, through = (plain(client.chat.completions.create(**(CHAT | more))) for client in clients)
    assert through == direct


@pytest.mark.parametrize("more", [{}, {"stream_options": {"include_usage": True}}], ids=str)
def test_streamed_completions_are_the_same(clients: tuple[openai.OpenAI, openai.OpenAI], more: dict[str, Any]) -> None:
    asked: Any = ASK | {"stream": True, "logprobs": 1} | more
    direct, through = (joined(client.completions.create(**asked), _completion_part) for client in clients)
    assert through == direct
    assert len(through["tokens"]) == ASK["max_tokens"]


def test_streamed_chats_are_the_same(clients: tuple[openai.OpenAI, openai.OpenAI]) -> None:
    asked: Any = CHAT | {"stream": True, "logprobs": True, "stream_options": {"include_usage": True}}
    direct, through = (joined(client.chat.completions.create(**asked), _chat_part) for client in clients)
    assert through == direct
    assert through["tokens"]


def joined(stream: Any, part: Callable[[Any], tuple[str, list[Any]]]) -> dict[str, Any]:
    """What the events of a stream say together: how vLLM cuts them depends on the moment."""
    found: dict[str, Any] = {"text": "", "tokens": [], "reasons": [], "usage": None}
    for event in stream:
        found["usage"] = event.usage.model_dump() if event.usage else found["usage"]
        for choice in event.choices:
            text, tokens = part(choice)
            found["text"] += text
            found["tokens"] += tokens
            found["reasons"] += [choice.finish_reason] if choice.finish_reason else []
    return found


def _completion_part(choice: Any) -> tuple[str, list[Any]]:
    found = choice.logprobs
    return choice.text, list(zip(found.tokens, found.token_logprobs, strict=True)) if found else []


def _chat_part(choice: Any) -> tuple[str, list[Any]]:
    found = choice.logprobs.content if choice.logprobs else []
    return choice.delta.content or "", [(token.token, token.logprob) for token in found or []]


@pytest.mark.parametrize(
    ("more", "kind"),
    [
        ({"max_tokens": 100_000}, openai.BadRequestError),
        ({"temperature": -1}, openai.BadRequestError),
        ({"prompt": "1 " * 500}, openai.BadRequestError),
        ({"n": "many"}, openai.BadRequestError),
        ({"logprobs": 10_000}, openai.BadRequestError),
        ({"model": "other"}, openai.NotFoundError),
    ],
    ids=str,
)
def test_errors_are_of_the_same_kind(
    clients: tuple[openai.OpenAI, openai.OpenAI], more: dict[str, Any], kind: type[openai.APIStatusError]
) -> None:
    told = []
    for client in clients:
        with pytest.raises(kind) as caught:
            client.completions.create(**(ASK | more))
        told.append(caught.value)
    direct, through = told
    assert through.status_code == direct.status_code
    if "model" not in more:
        assert through.body == direct.body


def test_a_wrong_key_is_an_authentication_error(clients: tuple[openai.OpenAI, openai.OpenAI]) -> None:
    for client in clients:
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="mk-wrong").completions.create(**ASK)


def test_models_are_listed_by_name_alias_and_version(clients: tuple[openai.OpenAI, openai.OpenAI]) -> None:
    _, through = clients
    names = {model.id for model in through.models.list()}
    assert {"tiny", "tiny@champion", "tiny@1"} <= names
    assert plain(through.completions.create(**(ASK | {"model": "tiny@champion"})))["model"] == "tiny"


def told(vllm: openai.OpenAI, series: str) -> float:
    """The present value of one of vLLM's metrics."""
    url = f"{str(vllm.base_url).rstrip('/').removesuffix('/v1')}/metrics"
    text = httpx.get(url, headers={"Authorization": f"Bearer {vllm.api_key}"}, timeout=60).text
    found = re.search(rf"^vllm:{series}{{.*}} (\S+)$", text, re.MULTILINE)
    assert found
    return float(found[1])


def test_a_client_that_leaves_ends_the_generation(clients: tuple[openai.OpenAI, openai.OpenAI]) -> None:
    direct, through = clients
    before = told(direct, "generation_tokens_total")
    prompts, tokens = 1000, 120  # many seconds of work
    long: dict[str, Any] = {"prompt": ["Question"] * prompts, "max_tokens": tokens, "extra_body": {"ignore_eos": True}}
    with through.completions.create(**(ASK | long), stream=True) as stream:
        next(iter(stream))
    deadline = time.monotonic() + 60
    while told(direct, "num_requests_running") and time.monotonic() < deadline:
        pass  # asking takes vLLM some milliseconds
    assert told(direct, "num_requests_running") == 0
    assert 0 < told(direct, "generation_tokens_total") - before < prompts * tokens
