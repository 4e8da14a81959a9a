"""The request log: a line for each request, ids that are harmless, and nothing of what was said."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Send
from starlette.types import Scope as AsgiScope

from moestro_flows.home import Home
from moestro_services.audit import Audit
from moestro_services.gateway.caller import Scope
from moestro_services.gateway.door import Door
from moestro_services.gateway.keys import KeyRing
from moestro_services.gateway.limits import Limits
from moestro_services.gateway.listening import listen, serving
from moestro_services.gateway.requests_log import REQUEST_ID, Logged, RequestLog
from moestro_services.gateway.traffic import MODEL

PROMPT = "the eagle has landed"


def inside() -> FastAPI:
    app = FastAPI()

    @app.post("/v1/completions")
    async def complete(request: Request) -> dict[str, Any]:
        request.scope[MODEL] = "assistant@3"
        await request.body()
        return {"id": request.scope[REQUEST_ID], "header": request.headers["x-request-id"]}

    @app.get("/v1/stream/{name}")
    def stream(name: str) -> StreamingResponse:
        parts = (f"data: {at}\n\n" for at in range(100))
        return StreamingResponse(parts, headers={"X-Request-Id": "upstreams"}, media_type="text/event-stream")

    @app.get("/v1/fail")
    def fail() -> None:
        raise ValueError(PROMPT)

    return app


class Logging:
    def __init__(self, home: Home) -> None:
        self.home = home
        self.log = RequestLog.of(home)
        self.keys = KeyRing.of(home)
        self.key, self.secret = self.keys.create("ci", [Scope.INFER])
        door = Door(inside(), keys=self.keys, limits=Limits(), counted=lambda _: None)
        self.logged = Logged(door, log=self.log)
        self.done = threading.Semaphore(0)
        self.url = ""

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        try:
            await self.logged(scope, receive, send)
        finally:
            self.done.release()

    @contextmanager
    def served(self) -> Iterator["Logging"]:
        with serving(self, listen("127.0.0.1", 0)) as self.url:
            yield self

    def ask(self, method: str, path: str, **headers: str) -> httpx.Response:
        known = {"Authorization": f"Bearer {self.secret}"} | headers
        return httpx.request(method, self.url + path, headers=known, json={"prompt": PROMPT}, timeout=20)

    def lines(self, count: int) -> list[dict[str, Any]]:
        """The lines of so many requests; the last may have been answered a moment before its line was written."""
        for _ in range(count):
            assert self.done.acquire(timeout=20)
        self.log.close()
        return [json.loads(line) for line in self.log.path.read_text().splitlines()]


@pytest.fixture
def logging(tmp_path: Path) -> Iterator[Logging]:
    with Logging(Home(tmp_path)).served() as made:
        yield made


def test_a_line_tells_who_asked_what_and_how_it_ended(logging: Logging) -> None:
    assert logging.ask("POST", "/v1/completions", **{"x-request-id": "r-1.a_B"}).status_code == 200
    (line,) = logging.lines(1)
    assert 0 < line.pop("first_byte_seconds") <= line.pop("seconds") < 20
    assert line.pop("at").startswith("20")
    assert line == {
        "request_id": "r-1.a_B",
        "key": logging.key.id,
        "client": "127.0.0.1",
        "method": "POST",
        "route": "/v1/completions",
        "model": "assistant@3",
        "status": 200,
        "refused": "",
        "complete": True,
    }


def test_refusals_and_faults_are_written_too(logging: Logging) -> None:
    logging.ask("POST", "/v1/completions", Authorization="Bearer no")
    logging.ask("GET", "/v1/fail")
    logging.ask("GET", f"/v1/{PROMPT}")
    refused, failed, unknown = logging.lines(3)
    assert (refused["status"], refused["refused"], refused["key"]) == (401, "wrong_key", "")
    assert (failed["status"], failed["key"]) == (500, logging.key.id)
    assert (unknown["status"], unknown["route"]) == (404, "")


def test_harmless_ids_are_kept_and_others_replaced_on_the_way_in_and_out(logging: Logging) -> None:
    for given in ("a", "x" * 64, "3.14-A_b"):
        answer = logging.ask("POST", "/v1/completions", **{"x-request-id": given})
        assert answer.headers.get_list("x-request-id") == [given]
        assert answer.json() == {"id": given, "header": given}
    made = set()
    for given in ("", "x" * 65, "a b", 'a"b', "a\tb", "a;b", "é", "../x", None):
        headers = {} if given is None else {"x-request-id": given.encode("latin-1").decode("latin-1")}
        answer = httpx.post(
            logging.url + "/v1/completions",
            headers=[(b"Authorization", f"Bearer {logging.secret}".encode())]
            + [(name.encode(), value.encode("latin-1")) for name, value in headers.items()],
        )
        (told,) = answer.headers.get_list("x-request-id")
        assert answer.json() == {"id": told, "header": told}
        made.add(told)
    assert len(made) == 9
    assert all(len(told) == 32 for told in made)


def test_a_streams_id_is_the_gateways_and_its_bytes_are_its_own(logging: Logging) -> None:
    answer = logging.ask("GET", "/v1/stream/a", **{"x-request-id": "mine"})
    assert answer.headers.get_list("x-request-id") == ["mine"]
    assert answer.content == b"".join(b"data: %d\n\n" % at for at in range(100))
    (line,) = logging.lines(1)
    assert (line["route"], line["complete"]) == ("/v1/stream/{name}", True)


def test_no_secret_and_no_word_of_a_request_is_anywhere_in_the_home(logging: Logging) -> None:
    Audit.of(logging.home).write("cli", "keys.create", logging.key.id, name="ci")
    secret = logging.secret
    logging.ask("POST", "/v1/completions")
    logging.ask("GET", f"/v1/stream/{secret}?key={secret}&prompt={PROMPT}")
    logging.ask("POST", f"/{secret}", **{"x-request-id": secret + "!"})
    logging.ask("GET", "/v1/fail")
    logging.keys.revoke(logging.key.id)
    logging.ask("POST", "/v1/completions")
    assert len(logging.lines(5)) == 5
    kept = b"".join(path.read_bytes() for path in logging.home.path.rglob("*") if path.is_file())
    assert secret[3:].encode() not in kept
    assert PROMPT.encode() not in kept
    assert logging.log.path.stat().st_mode & 0o777 == 0o600


def run(log: RequestLog, app: Any, *, times: int = 1) -> None:
    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(_message: Message) -> None:
        pass

    async def ask() -> None:
        for _ in range(times):
            await Logged(app, log=log)({"type": "http", "method": "GET", "path": "/", "headers": []}, receive, send)

    asyncio.run(ask())
    log.close()


async def silent(_scope: AsgiScope, _receive: Receive, _send: Send) -> None:
    """Its client has left."""


async def halved(_scope: AsgiScope, _receive: Receive, send: Send) -> None:
    """Its client leaves midway."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"a", "more_body": True})


def test_clients_that_left_are_told_apart(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "logs" / "gateway.jsonl")
    run(log, silent)
    run(log, halved)
    first, second = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert (first["status"], first["first_byte_seconds"], first["complete"]) == (499, None, False)
    assert (second["status"], second["complete"]) == (200, False)
    assert second["first_byte_seconds"] is not None


def test_a_full_file_makes_room_and_few_are_kept(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "gateway.jsonl", max_bytes=2000, kept_files=2)
    run(log, halved, times=60)
    files = sorted(tmp_path.iterdir())
    assert [path.name for path in files] == ["gateway.jsonl", "gateway.jsonl.1", "gateway.jsonl.2"]
    assert all(path.stat().st_size <= 2000 for path in files)
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in files)
    assert all(json.loads(line) for path in files for line in path.read_text().splitlines())


def test_a_disk_that_cannot_keep_up_costs_lines_not_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RequestLog(tmp_path / "gateway.jsonl")
    monkeypatch.setattr(log, "_start", lambda: None)
    log._queue.maxsize = 3
    for _ in range(5):
        log.write({})
    assert log.lost == 2


def test_a_disk_that_takes_nothing_costs_lines_and_stays_silent(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    log = RequestLog(tmp_path / "file" / "gateway.jsonl")
    for _ in range(3):
        log.write({})
    log.close()
    assert log.lost == 3
    assert capfd.readouterr().err == ""


def test_nothing_is_opened_before_the_first_line_and_closing_twice_is_no_mistake(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "logs" / "gateway.jsonl")
    log.close()
    assert [*tmp_path.iterdir()] == []
    log.write({"a": 1})
    log.close()
    log.close()
    log.write({"a": 2})
    log.close()
    assert log.path.read_text() == '{"a":1}\n{"a":2}\n'
