"""Following a lifecycle: every event once and in order, from where one left, until it has ended."""

import asyncio
import errno
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from moestro_services.gateway.lifecycles_events import begins_line, read_events


def parsed(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Server-sent events; comments are those of kind `comment`."""
    event: dict[str, Any] = {}
    for line in lines:
        if line.startswith(":"):
            yield {"event": "comment"}
        elif line:
            name, _, value = line.partition(": ")
            if name == "retry":
                continue
            event[name] = json.loads(value) if name == "data" else value
        elif "event" in event:
            yield event
            event = {}


def started(api: Any, admin: httpx.Client, *, hold: bool = False) -> str:
    api.configured()
    if hold:
        api.hold()
    return str(admin.post("/api/lifecycles", json={"config": "small"}).json()["id"])


def follow(client: httpx.Client, identity: str, **headers: str) -> list[dict[str, Any]]:
    with client.stream("GET", f"/api/lifecycles/{identity}/events", headers=headers) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        return [event for event in parsed(answer.iter_lines()) if event["event"] != "comment"]


def watching() -> int:
    """How many descriptors of this process watch files or processes."""
    count = 0
    for path in Path(f"/proc/{os.getpid()}/fd").iterdir():
        with suppress(FileNotFoundError):
            count += any(kind in str(path.readlink()) for kind in ("inotify", "pidf"))
    return count


def test_events_are_those_of_the_file_and_the_end(api: Any, admin: httpx.Client) -> None:
    identity = started(api, admin)
    events = follow(admin, identity)
    assert [event["event"] for event in events] == ["planned", "started", "ended", "ended", "finished"]
    written = [json.loads(line) for line in api.runs.events(identity).read_text().splitlines()]
    assert [event["data"] for event in events[:-1]] == written
    assert events[-1]["data"]["lifecycle"] == admin.get(f"/api/lifecycles/{identity}").json()
    assert [event["id"] for event in events] == [str(e.end) for e in read_events(api.runs.events(identity))] + ["end"]


def test_one_goes_on_after_any_event(api: Any, admin: httpx.Client) -> None:
    identity = started(api, admin)
    events = follow(admin, identity)
    for position, event in enumerate(events[:-1]):
        assert follow(admin, identity, **{"Last-Event-ID": event["id"]}) == events[position + 1 :]
    path = f"/api/lifecycles/{identity}/events"
    assert admin.get(path, headers={"Last-Event-ID": "end"}).status_code == 204
    for wrong in ("7", "99999999", "-1", "x", "1" * 30):
        assert admin.get(path, headers={"Last-Event-ID": wrong}).status_code == 400


def test_the_end_is_none_before_it_has_ended(api: Any, admin: httpx.Client) -> None:
    identity = started(api, admin, hold=True)
    path = f"/api/lifecycles/{identity}/events"
    assert admin.get(path, headers={"Last-Event-ID": "end"}).status_code == 400
    api.order("end")
    follow(admin, identity)
    assert admin.get(path, headers={"Last-Event-ID": "end"}).status_code == 204
    missing = admin.get("/api/lifecycles/20260102-030400-000001/events", headers={"Last-Event-ID": "end"})
    assert missing.status_code == 404


def test_where_nothing_can_be_watched_one_is_told_so(
    api: Any, admin: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = started(api, admin)

    def refuse(_: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    follow(admin, identity)
    before = watching()
    with monkeypatch.context() as patch:
        patch.setattr(os, "pidfd_open", refuse)
        answer = admin.get(f"/api/lifecycles/{identity}/events")
    assert (answer.status_code, answer.json()["error"]["kind"]) == (503, "ResourceError")
    assert "Too many open files" in answer.json()["error"]["message"]
    assert (watching(), api.feeds.followers) == (before, 0)


def test_a_follower_hears_at_once_and_of_silence_too(api: Any, admin: httpx.Client) -> None:
    identity = started(api, admin, hold=True)
    with admin.stream("GET", f"/api/lifecycles/{identity}/events") as answer:
        events = parsed(answer.iter_lines())
        heard: list[str] = []
        while heard[-1:] != ["comment"]:  # nothing happens: a comment
            heard.append(next(events)["event"])
        api.order("progress")
        while heard[-1] != "progress":
            heard.append(next(events)["event"])
        api.order("end")
        heard += [event["event"] for event in events]
    told = [kind for kind in heard if kind != "comment"]
    assert told == ["planned", "started", "progress", "ended", "ended", "finished"]


def test_many_follow_and_leave(api: Any, bearing: Callable[[str], httpx.Client]) -> None:
    admin = bearing("admin")
    identity = started(api, admin, hold=True)
    files = Path(f"/proc/{os.getpid()}/fd")
    with admin.stream("GET", f"/api/lifecycles/{identity}/events") as first:
        lines = parsed(first.iter_lines())
        next(lines)
        with ThreadPoolExecutor(20) as pool:
            clients = [bearing("read") for _ in range(20)]
            following = [pool.submit(follow, client, identity) for client in clients]
            while api.feeds.followers < 21:
                next(lines)  # a heartbeat or an event
            watches = [path for path in files.iterdir() if path.is_symlink() and "inotify" in str(path.readlink())]
            api.order("progress end")
            kinds = {tuple(event["event"] for event in one.result(30)) for one in following}
        assert kinds == {("planned", "started", "progress", "ended", "ended", "finished")}
        assert len(watches) <= 2  # of this feed, and at most one of the web server's
        list(lines)
    assert api.feeds.followers == 0


def test_one_who_leaves_is_forgotten_at_once(api: Any, bearing: Callable[[str], httpx.Client]) -> None:
    admin = bearing("admin")
    identity = started(api, admin, hold=True)
    api.feeds.heartbeat = 3600.0
    with admin.stream("GET", f"/api/lifecycles/{identity}/events") as stays:
        lines = parsed(stays.iter_lines())
        next(lines)
        with bearing("read").stream("GET", f"/api/lifecycles/{identity}/events") as leaves:
            others = parsed(leaves.iter_lines())
            next(others)
            assert api.feeds.followers == 2
        while api.feeds.followers > 1:
            api.order("progress")
            next(lines)
        api.order("end")
        assert [event["event"] for event in lines][-1] == "finished"
    assert api.feeds._open == {}


def test_a_generator_that_is_closed_gives_back_its_descriptors(api: Any, admin: httpx.Client) -> None:
    identity = started(api, admin, hold=True)

    async def look() -> None:
        before = watching()
        events = api.feeds.follow(identity)
        await anext(events)
        assert watching() == before + 2
        await events.aclose()
        assert (watching(), api.feeds.followers) == (before, 0)

    asyncio.run(look())
    api.order("end")


def test_half_a_line_and_what_is_no_event_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert list(read_events(path)) == []
    first = b'{"event": "started", "step": "seed"}\n'
    path.write_bytes(first + b"a warning\n[1]\n" + first + b'{"event": "started", "st')
    ends = [event.end for event in read_events(path)]
    assert ends == [len(first), 2 * len(first) + 14]
    assert [event.end for event in read_events(path, len(first))] == ends[1:]
    assert begins_line(path, len(first))
    assert not begins_line(path, 3)
    assert not begins_line(path, 10_000)


@pytest.mark.parametrize("word", ["read", "admin"])
def test_whoever_may_read_may_follow(api: Any, bearing: Callable[[str], httpx.Client], word: str) -> None:
    identity = started(api, bearing("admin"))
    assert follow(bearing(word), identity)[-1]["event"] == "finished"
