"""Scoring token ids through a server's REST interface, exactly as its users reach it.

Shapes: S tokens of a sequence, L layers, K chosen experts.
"""

import base64
import io
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from moestro.errors import ResourceError
from moestro.inference.engine import Scored
from moestro.inference.routes import RoutingShape, check_routes

TIMEOUT_SECONDS = 300
COMPLETIONS = "/v1/completions"


@dataclass(frozen=True)
class Endpoint:
    """Where a model answers."""

    url: str
    """The server's address, without a trailing slash."""
    model: str
    """Name of the model in requests."""
    api_key: str = field(default="", repr=False)
    """Key that requests bear; empty for a server that asks for none."""

    def client(self) -> httpx.Client:
        """A client for it; the caller closes it."""
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=TIMEOUT_SECONDS, trust_env=False)


def score_over_http(endpoint: Endpoint, sequences: list[list[int]], *, shape: RoutingShape | None) -> list[Scored]:
    """Log-probabilities and, with `shape`, routing of `sequences`, one request each.

    Raises `ResourceError` if the server answers anything but what was asked for.
    """
    with endpoint.client() as client:
        return [_score(client, endpoint.model, sequence, shape) for sequence in sequences]


def routes_over_http(endpoint: Endpoint, sequences: list[list[int]], *, shape: RoutingShape) -> list[np.ndarray]:
    """The expert choices [S, L, K] of every token of `sequences`.

    One request after the other: which of them vLLM computes together would be a matter of time, and can turn a close
    decision of a router. Raises as `score_over_http` does.
    """
    with endpoint.client() as client:
        return [_routes(client, endpoint.model, sequence, shape) for sequence in sequences]


def _score(client: httpx.Client, name: str, sequence: list[int], shape: RoutingShape | None) -> Scored:
    request = {"model": name, "prompt": sequence, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
    choice = _complete(client, request)
    steps = zip(sequence[1:], choice["prompt_logprobs"][1:], strict=True)
    logprobs = np.array([step[str(token)]["logprob"] for token, step in steps], np.float32)
    return Scored(logprobs, None if shape is None else _decoded(choice, len(sequence), shape))


def _routes(client: httpx.Client, name: str, sequence: list[int], shape: RoutingShape) -> np.ndarray:
    choice = _complete(client, {"model": name, "prompt": sequence, "max_tokens": 1, "temperature": 0.0})
    return _decoded(choice, len(sequence), shape)


def _complete(client: httpx.Client, request: dict[str, Any]) -> dict[str, Any]:
    try:
        response = client.post(COMPLETIONS, json=request)
    except httpx.HTTPError as error:
        raise ResourceError(f"The server at {client.base_url} does not answer: {error}.") from None
    if response.status_code != httpx.codes.OK:
        raise ResourceError(f"The server answered {response.status_code}: {response.text[:500]}")
    return dict(response.json()["choices"][0])


def _decoded(choice: dict[str, Any], rows: int, shape: RoutingShape) -> np.ndarray:
    encoded = choice.get("routed_experts")
    routes = np.load(io.BytesIO(base64.b64decode(encoded)), allow_pickle=False) if encoded else None
    return check_routes(routes, rows=rows, shape=shape)
