"""The board: a small actor through which what a stage reports on a worker reaches its driver."""

import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from moestro.artifacts import Reporter

SEND_SECONDS = 0.5


class Board:
    """The actor that holds what stages report until their driver takes it."""

    def __init__(self) -> None:
        self.events: defaultdict[str, list[tuple[Any, ...]]] = defaultdict(list)
        self.attempts: Counter[str] = Counter()
        self.places: defaultdict[str, list[Any]] = defaultdict(list)

    def begin(self, key: str) -> int:
        """Another worker reports under the key from now on; its number. Those before it are no longer heard."""
        self.attempts[key] += 1
        return self.attempts[key]

    def put(self, key: str, attempt: int, events: list[tuple[Any, ...]]) -> None:
        """Keep the events of a worker's `attempt`, unless another one has begun since."""
        if attempt >= self.attempts[key]:  # a board that was started anew has not heard of it
            self.events[key].extend(events)

    def place(self, key: str, reservation: Any) -> None:
        """Remember what holds cores for the group under the key."""
        self.places[key].append(reservation)

    def take_places(self, key: str) -> list[Any]:
        """What was remembered, once."""
        return self.places.pop(key, [])

    def take(self, key: str) -> list[tuple[Any, ...]]:
        """The events under the key that nobody has taken, in the order in which they came."""
        return self.events.pop(key, [])


def start_board() -> Any:
    """A board on the driver's own node: another one's loss is the driver's to survive. Started anew if it dies."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    board = ray.remote(Board).options(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)
    return board.remote()


class BoardReporter:
    """The worker's end of the board: sends at most twice a second."""

    def __init__(self, board: Any, key: str) -> None:
        self.board = board
        self.key = key
        # While a task waits in `ray.get`, Ray gives its cores to the next: two would then train on the cores of one.
        self.attempt = board.begin.remote(key).future().result()
        self.buffer: list[tuple[Any, ...]] = []
        self.sent = 0.0

    def progress(self, done: int, total: int, message: str = "") -> None:
        """`done` of `total` units; takes the place of what has not been sent yet."""
        self.buffer = [event for event in self.buffer if event[0] != "progress"]
        self._add(("progress", done, total, message))

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Named figures at a step."""
        self._add(("metrics", dict(values), step))

    def _add(self, event: tuple[Any, ...]) -> None:
        self.buffer.append(event)
        if time.monotonic() - self.sent > SEND_SECONDS:
            self.flush()

    def flush(self) -> Any:
        """Send what has gathered; returns the reference of the board's answer."""
        sent = self.board.put.remote(self.key, self.attempt, self.buffer)
        self.buffer = []
        self.sent = time.monotonic()
        return sent


def forward(events: list[tuple[Any, ...]], reporter: Reporter) -> None:
    """Report the events, each the name of a reporter's method and its arguments, to `reporter`."""
    for kind, *arguments in events:
        getattr(reporter, kind)(*arguments)
