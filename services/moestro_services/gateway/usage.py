"""How many tokens an answer took and whether it failed, read from its bytes without parsing all of it."""

import json
from dataclasses import dataclass
from typing import Any

MARK = b'"usage":{'
"""Never inside a JSON string, where its quotes would be escaped."""
TAIL_BYTES = 4096
FAILED_EVENT = b'data: {"error":'
"""How vLLM tells that a stream has failed; never inside a JSON string either."""
FAILED = 500
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Usage:
    """Tokens of one request."""

    prompt: int = 0
    completion: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.prompt + self.completion


def read_usage(answer: bytes) -> Usage | None:
    """The last usage that `answer`, or the end of it, tells; None if it tells none."""
    at = answer.rfind(MARK)
    if at < 0:
        return None
    text = answer[at + len(MARK) - 1 : at + TAIL_BYTES].decode(errors="replace")
    try:
        found: dict[str, Any] = _DECODER.raw_decode(text)[0]
    except ValueError:
        return None
    counts = [found.get(name) for name in ("prompt_tokens", "completion_tokens")]
    return Usage(*(count if isinstance(count, int) else 0 for count in counts))


def error_status(events: bytes) -> int:
    """The status of the last error among a stream's events; 0 without one. One that bears none is the server's."""
    at = events.rfind(FAILED_EVENT)
    if at < 0:
        return 0
    try:
        error = _DECODER.raw_decode(events[at + len(FAILED_EVENT) :].decode(errors="replace").lstrip())[0]
    except ValueError:
        return FAILED
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, int) and code >= 400 else FAILED


class StreamUsage:
    """Counts a stream of server-sent events as it passes.

    Without a usage event, which clients get who ask for it, every event counts as one token of the completion: fewer
    than there were if vLLM put several into one.
    """

    def __init__(self) -> None:
        self._lines = 0
        self._tail = b""

    def add(self, chunk: bytes) -> None:
        """Some more bytes of the stream."""
        self._lines += chunk.count(b"\n")  # JSON has none inside: two end an event
        self._tail = chunk if len(chunk) >= TAIL_BYTES else self._tail[-TAIL_BYTES:] + chunk

    @property
    def error(self) -> int:
        """The status that the server's error bears which ended it, if one did; 0 otherwise."""
        return error_status(self._tail)

    def usage(self) -> Usage:
        """What it took."""
        return read_usage(self._tail) or Usage(completion=max(0, self._lines // 2 - 1))
