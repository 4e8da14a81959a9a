"""A load of concurrent streams on one address: `python -m moestro_services.gateway_bench.load` with a `Load` as JSON.

Every stream asks, reads the answer to its end and asks again until the time is over. The process prints what happened
as a `Result`, as JSON. Several addresses take turns, a request each, so that what disturbs one disturbs the other.
"""

import asyncio
import json
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import aiohttp

from moestro.errors import ResourceError

DATA = b"data: "
DONE = b"[DONE]"
TIMEOUT_SECONDS = 120


@dataclass(frozen=True)
class Target:
    """Whom to ask."""

    url: str
    key: str = ""


@dataclass(frozen=True)
class Load:
    """What is asked, by how many at once, and how long."""

    targets: tuple[Target, ...]
    model: str
    streams: int = 64
    seconds: float = 15.0
    max_tokens: int = 32
    stream: bool = True
    retry: bool = False
    """Whether a 503 is asked again, as `Retry-After` suggests, without counting as failed."""
    spread: float = 0.0
    """Seconds over which the streams begin; answers of fixed length would otherwise keep them in step for ever."""


@dataclass
class Result:
    """What happened to the requests to one target."""

    seconds: float = 0.0
    answered: int = 0
    tokens: int = 0
    first_token: list[float] = field(default_factory=list)
    """Seconds from the request to the first event, for every answered request."""
    failed: dict[str, int] = field(default_factory=dict)
    """Requests that were not answered to the end, by what was wrong."""
    unavailable: int = 0
    """Clean 503s with Retry-After."""
    fingerprints: dict[str, int] = field(default_factory=dict)
    """Answers by their `system_fingerprint`."""
    longest_gap: float = 0.0
    """Seconds that passed without an answer, the longest time that it happened."""
    last_gap: float = 0.0
    """Seconds from the last answer to the end."""


def run(load: Load) -> list[Result]:
    """One result a target, measured in a process of its own; raises `ResourceError` if it fails."""
    return Running(load).results()


class Running:
    """A load that runs beside; `results` waits for its end."""

    def __init__(self, load: Load) -> None:
        command = [sys.executable, "-m", "moestro_services.gateway_bench.load"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(load)))
        self._process.stdin.close()

    def results(self) -> list[Result]:
        """One result a target; raises `ResourceError` if the process failed."""
        assert self._process.stdout is not None
        printed = self._process.stdout.read()
        if code := self._process.wait():
            raise ResourceError(f"The load's process ended with code {code}.")
        return [Result(**item) for item in json.loads(printed)]


async def _run(load: Load) -> list[Result]:
    results = [Result() for _ in load.targets]
    failed: list[Counter[str]] = [Counter() for _ in load.targets]
    answers: list[list[tuple[float, str]]] = [[] for _ in load.targets]
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
    connector = aiohttp.TCPConnector(limit=0)
    started = time.monotonic()
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        async def stream(number: int) -> None:
            asked = 0
            await asyncio.sleep(load.spread * number / load.streams)
            while time.monotonic() - started < load.seconds:
                turn = (number + asked) % len(load.targets)
                body = _body(load, number, asked)
                asked += 1
                try:
                    await _ask(session, load.targets[turn], body, results[turn], answers[turn], retry=load.retry)
                except (aiohttp.ClientError, TimeoutError, _LostError) as error:
                    failed[turn][str(error) or type(error).__name__] += 1

        await asyncio.gather(*(stream(number) for number in range(load.streams)))
    ended = time.monotonic()
    for result, counts, came in zip(results, failed, answers, strict=True):
        result.seconds, result.failed = ended - started, dict(counts)
        result.fingerprints = dict(Counter(fingerprint for _, fingerprint in came))
        moments = [started, *(moment for moment, _ in came), ended]
        gaps = [later - sooner for sooner, later in pairwise(moments)]
        result.longest_gap, result.last_gap = max(gaps), gaps[-1]
    return results


class _LostError(Exception):
    """A request without the answer that it asked for."""


def _body(load: Load, number: int, asked: int) -> dict[str, Any]:
    """A prompt of its own for every request, so that no two share what a prefix cache holds."""
    return {
        "model": load.model,
        "prompt": f"Question {number}.{asked}: What is {number} + {asked}?\nAnswer:",
        "max_tokens": load.max_tokens,
        "min_tokens": load.max_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": load.stream,
    }


async def _ask(
    session: aiohttp.ClientSession,
    target: Target,
    body: dict[str, Any],
    result: Result,
    came: list[tuple[float, str]],
    *,
    retry: bool,
) -> None:
    headers = {"Authorization": f"Bearer {target.key}"} if target.key else {}
    began = time.perf_counter()
    async with session.post(f"{target.url}/v1/completions", json=body, headers=headers) as answer:
        if answer.status == 503 and retry and "Retry-After" in answer.headers:
            result.unavailable += 1
            await asyncio.sleep(min(1.0, float(answer.headers["Retry-After"])))
            return
        if answer.status != 200:
            raise _LostError(f"{answer.status}: {(await answer.text())[:200]}")
        read = _read_stream if body["stream"] else _read_whole
        first, fingerprint = await read(answer)
    result.answered += 1
    result.tokens += body["max_tokens"]
    result.first_token.append(first - began)
    came.append((time.monotonic(), fingerprint))


async def _read_stream(answer: aiohttp.ClientResponse) -> tuple[float, str]:
    """When the first event came, and the answer's fingerprint."""
    first, event, before = 0.0, b"", b""
    async for line in answer.content:
        if not line.startswith(DATA):
            continue
        before, event = event, line[len(DATA) :].strip()
        if event.startswith(b'{"error"'):
            raise _LostError(f"error in the stream: {event[:200].decode()}")
        first = first or time.perf_counter()
    if event != DONE:
        raise _LostError("the stream ended before [DONE]")
    return first, json.loads(before).get("system_fingerprint") or ""  # vLLM writes it into the last event alone


async def _read_whole(answer: aiohttp.ClientResponse) -> tuple[float, str]:
    whole = await answer.json()
    return time.perf_counter(), whole.get("system_fingerprint") or ""


def main() -> None:
    """Entry point: a `Load` on standard input, its results on standard output."""
    given = json.load(sys.stdin)
    targets = tuple(Target(**item) for item in given.pop("targets"))
    results = asyncio.run(_run(Load(targets=targets, **given)))
    json.dump([asdict(result) for result in results], sys.stdout)


if __name__ == "__main__":
    main()
