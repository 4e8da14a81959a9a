"""What is measured of a server from outside: how long its answers take, its routes, its memory."""

import base64
import io
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from moestro.errors import ResourceError
from moestro.inference.client import Endpoint, routes_over_http
from moestro.inference.footprint import machine, peak_memory
from moestro.inference.routes import RoutingShape
from moestro.inference.timing import time_over_http, timing_of


class Stream(BaseHTTPRequestHandler):
    """Answers a completion as vLLM streams it. Requests that count wait until two are there."""

    pair = threading.Barrier(2, timeout=30)
    asked: list[dict[str, Any]] = []  # noqa: RUF012
    tokens = 3
    status = 200

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(request | {"authorization": self.headers.get("Authorization")})
        if request.get("cache_salt") != "timing-warm-up":
            self.pair.wait()
        self.send_response(self.status)
        self.end_headers()
        said: list[dict[str, Any]] = [{"choices": [{"text": str(number)}]} for number in range(self.tokens)]
        said.append({"choices": [], "usage": {"completion_tokens": self.tokens}})
        self.stream([b"data: " + json.dumps(event).encode() + b"\n\n" for event in said] + [b"data: [DONE]\n\n"])

    def stream(self, events: list[bytes]) -> None:
        for event in events:
            self.wfile.write(event)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextmanager
def upstream(kind: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def test_answers_are_timed_side_by_side_and_from_no_cache() -> None:
    Stream.asked.clear()
    with upstream(Stream) as url:
        endpoint = Endpoint(url, "tiny", api_key="secret")
        timings = time_over_http(endpoint, [[1, 2]] * 4, output_tokens=3, concurrency=2)
    assert len(timings) == 4
    assert all(timing.first_token_seconds > 0 and timing.per_token_seconds >= 0 for timing in timings)
    assert len({request["cache_salt"] for request in Stream.asked}) == 5  # the first of them warms up
    assert {request["authorization"] for request in Stream.asked} == {"Bearer secret"}
    assert "secret" not in repr(endpoint)


def test_tokens_that_come_at_once_share_the_time_of_all() -> None:
    class AtOnce(Stream):
        """As uvicorn streams: a chunk for each event; but a client sees all of them in one read."""

        protocol_version = "HTTP/1.1"
        pair = threading.Barrier(1)

        def send_response(self, *arguments: Any) -> None:
            super().send_response(*arguments)
            self.send_header("Transfer-Encoding", "chunked")

        def stream(self, events: list[bytes]) -> None:
            self.wfile.write(b"".join(b"%x\r\n%s\r\n" % (len(event), event) for event in [*events, b""]))

    with upstream(AtOnce) as url:
        (timing,) = time_over_http(Endpoint(url, "tiny"), [[1, 2]], output_tokens=3, concurrency=1)
    assert timing.per_token_seconds == pytest.approx(timing.first_token_seconds / 3, rel=0.1)


@pytest.mark.parametrize(
    ("arrived", "tokens", "per_token"),
    [
        ([5.0, 5.1, 5.2, 5.3], 4, 0.1),
        ([5.0, 5.2], 4, 0.1),  # two tokens with each event
        ([5.3, 5.3001, 5.3002, 5.4], 4, 0.1),  # the client was late for all but the last
        ([5.4, 5.4001, 5.4002, 5.4003], 4, 0.1),  # and for all
    ],
)
def test_a_late_client_does_not_make_a_server_fast(arrived: list[float], tokens: int, per_token: float) -> None:
    assert timing_of(5.0, arrived, tokens).per_token_seconds == pytest.approx(per_token, rel=1e-2)


@pytest.mark.parametrize(
    ("fields", "message"), [({"tokens": 2}, "2 tokens where 3"), ({"status": 503}, "answered 503")]
)
def test_an_answer_of_another_length_or_none_is_named(fields: dict[str, Any], message: str) -> None:
    with (
        upstream(type("Other", (Stream,), fields)) as url,
        pytest.raises(ResourceError, match=message),
    ):
        time_over_http(Endpoint(url, "tiny"), [[1, 2]], output_tokens=3, concurrency=1)


def test_a_server_that_is_gone_is_named() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(ResourceError, match="does not answer"):
        time_over_http(Endpoint(url, "tiny"), [[1]], output_tokens=2, concurrency=1)


def test_routes_are_asked_for_one_after_the_other() -> None:
    class Routed(Stream):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            routes, content = np.array([[[0, token]] for token in request["prompt"]], np.uint8), io.BytesIO()
            np.save(content, routes)
            self.asked.append(request)
            self.send_response(200)
            self.end_headers()
            encoded = base64.b64encode(content.getvalue()).decode()
            self.wfile.write(json.dumps({"choices": [{"routed_experts": encoded}]}).encode())

    Stream.asked.clear()
    with upstream(Routed) as url:
        first, second = routes_over_http(Endpoint(url, "tiny"), [[1, 2], [3]], shape=RoutingShape(1, 4, 2))
    assert [request["prompt"] for request in Stream.asked] == [[1, 2], [3]]
    assert (first.tolist(), second.tolist()) == ([[[0, 1]], [[0, 2]]], [[[0, 3]]])


HOLDING = """
import socket, sys
held = bytearray(200_000_000)
del held
with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    print(listener.getsockname()[1], flush=True)
    sys.stdin.read()
"""


def test_memory_is_the_peak_of_the_group_that_listens() -> None:
    command = [sys.executable, "-c", HOLDING]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout
        port = int(process.stdout.readline())
        assert 200_000_000 < peak_memory(port) < 300_000_000
        process.communicate()
    with pytest.raises(ResourceError, match=f"listens on port {port}"):
        peak_memory(port)


def test_a_machine_is_described_without_its_name() -> None:
    words = machine(2)
    assert words == machine(2) != machine(1)
    assert words.endswith("2 threads")
    assert socket.gethostname() not in words
