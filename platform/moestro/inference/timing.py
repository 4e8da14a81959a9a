"""How long a server takes to answer, measured from outside, as its users see it."""

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

from moestro.errors import ResourceError
from moestro.inference.client import COMPLETIONS, Endpoint

EVENT = "data: "
END = "[DONE]"
TOGETHER_SECONDS = 5e-4
"""Tokens that come closer than this came at once: to a client that had to wait for a core, all that it had missed."""


@dataclass(frozen=True)
class Timing:
    """One streamed answer."""

    first_token_seconds: float
    """From sending the request to its first token."""
    per_token_seconds: float
    """Mean time of a token that came after the first; where all came at once, the share of one in the whole time."""


def time_over_http(
    endpoint: Endpoint, prompts: Sequence[list[int]], *, output_tokens: int, concurrency: int
) -> list[Timing]:
    """Timings of greedy answers of `output_tokens` (at least two) to `prompts` of token ids, `concurrency` at a time.

    Nothing is taken from the server's prefix cache. One more request, the first, is not counted: it warms up.
    Raises `ResourceError` if an answer has another length or the server does not answer.
    """
    with endpoint.client() as client, ThreadPoolExecutor(concurrency) as threads:
        requests = [_request(endpoint.model, prompt, output_tokens, str(at)) for at, prompt in enumerate(prompts)]
        _time(client, _request(endpoint.model, prompts[0], output_tokens, "warm-up"))
        return list(threads.map(lambda request: _time(client, request), requests))


def _request(model: str, prompt: list[int], output_tokens: int, salt: str) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "cache_salt": f"timing-{salt}",
    }


def _time(client: httpx.Client, request: dict[str, Any]) -> Timing:
    started = time.perf_counter()
    arrived: list[float] = []
    tokens = 0
    try:
        with client.stream("POST", COMPLETIONS, json=request) as response:
            if response.status_code != httpx.codes.OK:
                raise ResourceError(f"The server answered {response.status_code}: {response.read()[:500]!r}")
            for event in _events(response):
                if event.get("choices"):
                    arrived.append(time.perf_counter())
                if event.get("usage"):
                    tokens = int(event["usage"]["completion_tokens"])
    except httpx.HTTPError as error:
        raise ResourceError(f"The server at {client.base_url} does not answer: {error}.") from None
    if not arrived or tokens != request["max_tokens"]:
        raise ResourceError(f"The server answered {tokens} tokens where {request['max_tokens']} were asked for.")
    return timing_of(started, arrived, tokens)


def timing_of(started: float, arrived: Sequence[float], tokens: int) -> Timing:
    """What a request sent at `started` took, whose `tokens` came with the events that `arrived` in turn."""
    first, last = arrived[0], arrived[-1]
    later = sum(at - first >= TOGETHER_SECONDS for at in arrived)
    if not later:
        return Timing(first - started, (last - started) / tokens)
    return Timing(first - started, (last - first) / (later * tokens / len(arrived)))


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line.startswith(EVENT) and (content := line.removeprefix(EVENT)) != END:
            yield json.loads(content)
