"""Asking a stream's request again, for the routes that vLLM does not put into streams.

What is asked is the same prompt for one token: vLLM finds most of it in its prefix cache and returns the routes of
all of it. Fields that do not shape the prompt are left out, so that nothing else is made or stored a second time.
"""

import json
from collections.abc import Callable
from typing import Any, Protocol

import httpx

from moestro.errors import ResourceError
from moestro_services.gateway.deployments import Deployment

SHAPES_THE_PROMPT = frozenset(
    {
        "model",
        "prompt",
        "prompt_embeds",
        "messages",
        "tools",
        "documents",
        "reasoning_effort",
        "chat_template",
        "chat_template_kwargs",
        "add_generation_prompt",
        "continue_final_message",
        "add_special_tokens",
        "media_io_kwargs",
        "mm_processor_kwargs",
        "truncate_prompt_tokens",
        "truncation_side",
        "cache_salt",
        "vllm_xargs",
    }
)
ASK_SECONDS = 30.0


class Reachable(Protocol):
    """Where a model's server answers."""

    @property
    def url(self) -> str:
        """Its address, without a trailing slash."""

    @property
    def api_key(self) -> str:
        """What requests must bear; empty for nothing."""


Ask = Callable[[Deployment, str, bytes], bytes]
"""Asks the deployment's server at a path with a body; gives the answer's body, or raises a `MoestroError`."""


def asked_again(request: bytes) -> bytes:
    """The request for the routes of the prompt of `request`, a JSON object: not streamed, of one token.

    Of several prompts it is the first.
    """
    asked: dict[str, Any] = json.loads(request)
    again = {name: value for name, value in asked.items() if name in SHAPES_THE_PROMPT}
    prompt = again.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        again["prompt"] = prompt[0]
    if again.get("tools"):
        again["tool_choice"] = "none"  # the prompt lists them all the same, and nobody parses one token for a call
    return json.dumps(again | {"max_tokens": 1, "n": 1, "stream": False, "temperature": 0.0}).encode()


class Asking:
    """`Ask` over HTTP, from any thread but the event loop's."""

    def __init__(self, where: Callable[[Deployment], Reachable], *, timeout: float = ASK_SECONDS) -> None:
        """`where` tells where a deployment answers now, or raises a `MoestroError`."""
        self._where = where
        self._client = httpx.Client(timeout=timeout, trust_env=False)

    def __call__(self, deployment: Deployment, path: str, body: bytes) -> bytes:
        """The answer's body; raises `ResourceError` if there is none, and what `where` raises."""
        at = self._where(deployment)
        headers = {"Content-Type": "application/json"}
        if at.api_key:
            headers["Authorization"] = f"Bearer {at.api_key}"
        try:
            response = self._client.post(at.url + path, content=body, headers=headers)
        except httpx.HTTPError as error:
            raise ResourceError(f"The server of {deployment.label} does not answer: {error}.") from None
        if response.status_code != httpx.codes.OK:
            raise ResourceError(f"The server of {deployment.label} answered {response.status_code}.")
        return response.content

    def close(self) -> None:
        """Close its connections."""
        self._client.close()
