"""Requests and answers under /v1 as the OpenAPI document describes them: the fields that OpenAI's clients know.

They describe, they check nothing: requests go to vLLM as they are, answers come back as they are, and both may hold
vLLM's own fields beside these.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)


class Sampling(_Open):
    """What both kinds of requests may say."""

    model: str = Field(min_length=1)
    """A model's name (its champion), `name@alias` or `name@version`."""
    max_tokens: int | None = None
    """Longest answer."""
    temperature: float | None = None
    """0 takes the likeliest token."""
    top_p: float | None = None
    """Share of the probability that tokens are drawn from."""
    n: int | None = None
    """Answers per prompt."""
    seed: int | None = None
    """The same seed gives the same answer."""
    stop: str | list[str] | None = None
    """Where an answer ends."""
    stream: bool | None = None
    """Answer with server-sent events."""
    stream_options: dict[str, Any] | None = None
    """Such as `include_usage`."""
    presence_penalty: float | None = None
    """Penalty on tokens that occurred."""
    frequency_penalty: float | None = None
    """Penalty on tokens by how often they occurred."""
    logit_bias: dict[str, float] | None = None
    """Added to the logits of tokens."""
    user: str | None = None
    """Whom it is for: one user's requests go to one version while there is a canary."""
    steering_profile: str | None = None
    """Name or beginning of the fingerprint of a steering profile. For administrators."""


class CompletionRequest(Sampling):
    """A prompt to be continued."""

    prompt: str | list[str] | list[int] | list[list[int]]
    """Text or tokens, one prompt or several."""
    logprobs: int | None = None
    """Log-probabilities of so many likeliest tokens."""
    echo: bool | None = None
    """Give the prompt back as well."""


class Message(_Open):
    """One message of a conversation."""

    role: str
    """`system`, `user`, `assistant` or `tool`."""
    content: str | list[dict[str, Any]] | None = None
    """Its text."""
    tool_calls: list[dict[str, Any]] | None = None
    """Calls of tools."""
    tool_call_id: str | None = None
    """Which call a tool's message answers."""


class ChatRequest(Sampling):
    """A conversation to be answered. The checkpoint needs a chat template."""

    messages: list[Message] = Field(min_length=1)
    """The conversation."""
    logprobs: bool | None = None
    """Give log-probabilities."""
    top_logprobs: int | None = None
    """Of so many likeliest tokens."""
    max_completion_tokens: int | None = None
    """Longest answer."""
    tools: list[dict[str, Any]] | None = None
    """Tools that may be called."""
    tool_choice: str | dict[str, Any] | None = None
    """Which tool is to be called."""
    response_format: dict[str, Any] | None = None
    """Form of the answer."""


class Usage(_Open):
    """Tokens that were counted."""

    prompt_tokens: int
    """Of the prompt."""
    completion_tokens: int | None = None
    """Of the answers."""
    total_tokens: int
    """Together."""


class Choice(_Open):
    """What both kinds of answers hold, of which there may be several."""

    index: int
    """Its number."""
    logprobs: dict[str, Any] | None = None
    """Log-probabilities, if asked for."""
    finish_reason: str | None = None
    """`stop`, `length`, `tool_calls` or another of vLLM's."""


class Answer(_Open):
    """What both kinds of responses hold."""

    id: str
    """Its id."""
    created: int
    """Unix time."""
    model: str
    """The model that answered."""
    usage: Usage | None = None
    """Tokens that were counted."""
    system_fingerprint: str | None = None
    """`name@version` that answered."""


class CompletionChoice(Choice):
    """One answer."""

    text: str
    """Its text."""


class Completion(Answer):
    """A continued prompt; with `stream`, each event holds a part of it."""

    object: Literal["text_completion"]
    """Always so."""
    choices: list[CompletionChoice]
    """The answers."""


class ChatChoice(Choice):
    """One answer."""

    message: Message
    """The answer."""


class ChatCompletion(Answer):
    """An answer in a conversation; with `stream`, each event holds a part of it."""

    object: Literal["chat.completion"]
    """Always so."""
    choices: list[ChatChoice]
    """The answers."""


class OpenAIErrorBody(_Open):
    """What went wrong."""

    message: str
    """In words."""
    type: str
    """Its kind."""
    param: str | None = None
    """The field it is about."""
    code: str | int | None = None
    """A word for programs."""


class OpenAIError(_Open):
    """Body of every refusal under /v1."""

    error: OpenAIErrorBody
    """The error."""


COMPLETION_EXAMPLE = {"model": "assistant", "prompt": "Question: What is 12 + 7?\nAnswer:", "max_tokens": 8}
CHAT_EXAMPLE = {"model": "assistant@champion", "messages": [{"role": "user", "content": "What is 12 + 7?"}]}
STREAM_EXAMPLE = (
    'data: {"id":"cmpl-1","object":"text_completion","choices":[{"index":0,"text":" 19"}]}\n\ndata: [DONE]\n\n'
)
REQUESTS: dict[str, tuple[type[BaseModel], type[BaseModel], dict[str, Any]]] = {
    "/v1/completions": (CompletionRequest, Completion, COMPLETION_EXAMPLE),
    "/v1/chat/completions": (ChatRequest, ChatCompletion, CHAT_EXAMPLE),
}
"""Request, answer and an example by path."""
