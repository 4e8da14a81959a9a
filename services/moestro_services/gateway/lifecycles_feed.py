"""Following a lifecycle as server-sent events: woken by the kernel when its file grows or its process ends.

All followers of a lifecycle share one inotify descriptor and one of the process, closed with the last of them. Each
reads the file from where it is: a slow one holds nothing up and nothing is kept for it. An event's id is where its
line ends, so that it means the same after a restart of the gateway.
"""

import asyncio
import ctypes
import json
import os
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moestro.errors import ConfigError, ResourceError
from moestro_services.gateway.lifecycles_events import begins_line, read_events
from moestro_services.gateway.lifecycles_process import ProcessMark
from moestro_services.gateway.lifecycles_runs import Lifecycles
from moestro_services.gateway.lifecycles_schemas import FinishedEvent

HEARTBEAT_SECONDS = 15.0
RETRY_MILLISECONDS = 2000
EVENT_ID_PATTERN = r"^([0-9]{1,18}|end)$"
END = "end"
"""Id of the last event."""

_MODIFIED = 0x2
_libc = ctypes.CDLL(None, use_errno=True)


class _Feed:
    """What wakes the followers of one lifecycle, in the loop of its first follower."""

    def __init__(self, folder: Path, process: ProcessMark) -> None:
        self.followers: set[asyncio.Event] = set()
        self._loop = asyncio.get_running_loop()
        self._changes = _watched(folder)
        try:
            self._process = process.open()
        except OSError as error:
            os.close(self._changes)
            raise _not_now(error.strerror or str(error)) from None
        self._loop.add_reader(self._changes, self._changed)
        if self._process is not None:
            self._loop.add_reader(self._process, self._ended)

    def _changed(self) -> None:
        os.read(self._changes, 1 << 16)
        self._wake()

    def _ended(self) -> None:
        self._close_process()
        self._wake()

    def _wake(self) -> None:
        for follower in self.followers:
            follower.set()

    def _close_process(self) -> None:
        if self._process is not None:
            self._loop.remove_reader(self._process)
            os.close(self._process)
            self._process = None

    def close(self) -> None:
        self._close_process()
        self._loop.remove_reader(self._changes)
        os.close(self._changes)


class Feeds:
    """Follows lifecycles. To be used within one event loop at a time."""

    def __init__(self, lifecycles: Lifecycles, *, heartbeat: float = HEARTBEAT_SECONDS) -> None:
        self.lifecycles = lifecycles
        self.heartbeat = heartbeat
        self._open: dict[str, _Feed] = {}

    @property
    def followers(self) -> int:
        """How many follow now."""
        return sum(len(feed.followers) for feed in self._open.values())

    def position(self, identity: str, last_event_id: str) -> int | None:
        """Where to go on after that event; None if it was the last one.

        Raises `InputError` if there is no such lifecycle, `ConfigError` if it has no such event.
        """
        if not self.lifecycles.process(identity).running() and last_event_id == END:
            return None
        path = self.lifecycles.events(identity)
        if not last_event_id.isdecimal() or not begins_line(path, int(last_event_id)):
            raise ConfigError(
                f"Last-Event-ID: {last_event_id!r} is no event of lifecycle {identity}.",
                hint="Leave it out to follow from the beginning.",
            )
        return int(last_event_id)

    async def follow(self, identity: str, offset: int = 0) -> AsyncGenerator[str]:
        """Server-sent events from `offset` to the end of the lifecycle, with comments while nothing happens.

        Raises `InputError` if there is no such lifecycle and `ResourceError` if it cannot be watched, both before
        anything is yielded.
        """
        process = self.lifecycles.process(identity)
        path = self.lifecycles.events(identity)
        with self._woken(identity, process) as woken:
            yield f"retry: {RETRY_MILLISECONDS}\n\n"
            running = True
            while running:
                running = process.running()  # before reading: what was written before it ended is read then
                for event in read_events(path, offset):
                    offset = event.end
                    yield _sent(str(event.end), event.kind, json.dumps(event.content, ensure_ascii=False))
                if running and not await _within(woken, self.heartbeat):
                    yield ": nothing new\n\n"
        lifecycle = await asyncio.to_thread(self.lifecycles.detail, identity)
        yield _sent(END, "finished", FinishedEvent(lifecycle=lifecycle).model_dump_json())

    @contextmanager
    def _woken(self, identity: str, process: ProcessMark) -> Iterator[asyncio.Event]:
        """An event that is set when there is something to look at."""
        woken = asyncio.Event()
        feed = self._open.get(identity)
        if feed is None:
            feed = self._open[identity] = _Feed(self.lifecycles.events(identity).parent, process)
        feed.followers.add(woken)
        try:
            yield woken
        finally:
            feed.followers.discard(woken)
            if not feed.followers:
                del self._open[identity]
                feed.close()


async def _within(woken: asyncio.Event, seconds: float) -> bool:
    """Wait until it is set, and clear it; false if it was not set in time."""
    try:
        async with asyncio.timeout(seconds):
            await woken.wait()
    except TimeoutError:
        return False
    woken.clear()
    return True


def _sent(identity: str, kind: str, data: str) -> str:
    return f"id: {identity}\nevent: {kind}\ndata: {data}\n\n"


def _watched(folder: Path) -> int:
    """A descriptor, readable when a file in `folder` has grown; raises `ResourceError` if there are too many."""
    watch: Callable[[int, bytes, int], int] = _libc.inotify_add_watch
    handle = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    if handle < 0 or watch(handle, os.fsencode(folder), _MODIFIED) < 0:
        reason = os.strerror(ctypes.get_errno())
        if handle >= 0:
            os.close(handle)
        raise _not_now(reason)
    return int(handle)


def _not_now(reason: str) -> ResourceError:
    return ResourceError(f"The lifecycle cannot be followed ({reason}).", hint="Ask again later.")
