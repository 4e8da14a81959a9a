"""Scoring token ids through a server's REST interface, exactly as its users reach it.

Shapes: S tokens of a sequence, L layers, K chosen experts.
"""

import base64
import io
from typing import Any

import httpx
import numpy as np

from moestro.errors import ResourceError
from moestro.inference.engine import Scored
from moestro.inference.routes import RoutingShape, check_routes

TIMEOUT_SECONDS = 300


def score_over_http(
    url: str, name: str, sequences: list[list[int]], *, shape: RoutingShape | None, api_key: str = ""
) -> list[Scored]:
    """Log-probabilities and, with `shape`, routing of `sequences` under the model `name` at `url`.

    `api_key` is what the server wants requests to bear (`VllmServer.api_key`).

    Raises `ResourceError` if the server answers anything but what was asked for.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    with httpx.Client(base_url=url, timeout=TIMEOUT_SECONDS, trust_env=False, headers=headers) as client:
        return [_score(client, name, sequence, shape) for sequence in sequences]


def _score(client: httpx.Client, name: str, sequence: list[int], shape: RoutingShape | None) -> Scored:
    request = {"model": name, "prompt": sequence, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
    try:
        response = client.post("/v1/completions", json=request)
    except httpx.HTTPError as error:
        raise ResourceError(f"The server at {client.base_url} does not answer: {error}.") from None
    if response.status_code != httpx.codes.OK:
        raise ResourceError(f"The server answered {response.status_code}: {response.text[:500]}")
    choice: dict[str, Any] = response.json()["choices"][0]
    steps = zip(sequence[1:], choice["prompt_logprobs"][1:], strict=True)
    logprobs = np.array([step[str(token)]["logprob"] for token, step in steps], np.float32)
    if shape is None:
        return Scored(logprobs, None)
    encoded = choice.get("routed_experts")
    routes = np.load(io.BytesIO(base64.b64decode(encoded)), allow_pickle=False) if encoded else None
    return Scored(logprobs, check_routes(routes, rows=len(sequence), shape=shape))
