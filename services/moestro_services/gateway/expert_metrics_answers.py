"""From a request and vLLM's answer to it: how many tokens each expert got, each token counted once.

A choice of P prompt tokens and O sampled ones bears P + O - 1 rows. The n choices of one prompt all repeat its rows.

C choices, R rows, L layers with experts, E experts, K chosen experts.
"""

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from moestro.errors import ResourceError
from moestro.inference.routes import RoutingShape, check_routes
from moestro.inference.steering import RESERVED_ARGUMENTS
from moestro_services.gateway.expert_metrics_sampling import NotCountedError, Reason


class _Request(BaseModel):
    n: int | None = None
    routed_experts_prompt_start: int = 0
    vllm_xargs: dict[str, Any] | None = None


class _Choice(BaseModel):
    routed_experts: str | None = None


class _Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int


class _Answer(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage


@dataclass(frozen=True)
class Counted:
    """What one request adds."""

    counts_LE: np.ndarray
    """Tokens that chose each expert, int64."""
    tokens: int
    """Tokens whose routing was seen."""


def check_unsteered(request: bytes) -> None:
    """Raise `NotCountedError` if the request, as it went to vLLM, is steered or no request."""
    if any(name.startswith(RESERVED_ARGUMENTS) for name in _request(request).vllm_xargs or ()):
        raise NotCountedError(Reason.STEERED)


def count_answer(request: bytes, answer: bytes, shape: RoutingShape) -> Counted:
    """What `answer` adds; `request` is what vLLM was asked. Raises `NotCountedError`.

    Where several prompts have several choices each, it cannot be told where prompts end: there the first choice of
    each prompt counts, the others do not.
    """
    asked, answered = _request(request), _answer(answer)
    per_prompt = max(asked.n or 1, 1)
    routes_CRLK = _checked(answered, asked.routed_experts_prompt_start, per_prompt, shape)
    if per_prompt > 1 and len(routes_CRLK) == per_prompt:
        prompt_rows = answered.usage.prompt_tokens - asked.routed_experts_prompt_start
        kept = [routes_CRLK[0], *(routes_RLK[prompt_rows:] for routes_RLK in routes_CRLK[1:])]
    else:
        kept = routes_CRLK[::per_prompt]
    routes_RLK = np.concatenate(kept)
    return Counted(_count(routes_RLK, shape.num_experts), len(routes_RLK))


def _count(routes_RLK: np.ndarray, experts: int) -> np.ndarray:
    layers = routes_RLK.shape[1]
    cells_RLK = routes_RLK.astype(np.int64) + np.arange(layers)[:, None] * experts
    return np.bincount(cells_RLK.ravel(), minlength=layers * experts).reshape(layers, experts)


def _checked(answer: _Answer, start: int, per_prompt: int, shape: RoutingShape) -> list[np.ndarray]:
    """Routes of every choice; all of them together have the rows that usage tells of."""
    routes_CRLK = [_decoded(choice.routed_experts) for choice in answer.choices]
    tokens = per_prompt * answer.usage.prompt_tokens + answer.usage.completion_tokens
    due = tokens - len(routes_CRLK) * (1 + start)
    if len(routes_CRLK) % per_prompt or sum(map(len, routes_CRLK)) != due:
        raise NotCountedError(Reason.BAD_ROUTES)
    try:
        return [check_routes(routes_RLK, rows=len(routes_RLK), shape=shape) for routes_RLK in routes_CRLK]
    except ResourceError:
        raise NotCountedError(Reason.BAD_ROUTES) from None


def _decoded(encoded: str | None) -> np.ndarray:
    if encoded is None:
        raise NotCountedError(Reason.NO_ROUTES)
    try:
        stream = io.BytesIO(base64.b64decode(encoded, validate=True))
        routes_RLK: np.ndarray = np.lib.format.read_array(stream, allow_pickle=False)
    except ValueError:
        raise NotCountedError(Reason.BAD_ROUTES) from None
    if routes_RLK.ndim != 3 or routes_RLK.dtype.kind not in "iu":
        raise NotCountedError(Reason.BAD_ROUTES)
    return routes_RLK


def _request(body: bytes) -> _Request:
    try:
        return _Request.model_validate_json(body)
    except ValidationError:
        raise NotCountedError(Reason.NO_ANSWER) from None


def _answer(body: bytes) -> _Answer:
    try:
        return _Answer.model_validate_json(body)
    except ValidationError:
        raise NotCountedError(Reason.NO_ANSWER) from None
