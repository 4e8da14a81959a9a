"""`Window`: the latest requests to one version, by whom they were; `Figures`: what they say of it."""

import statistics
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

LONGEST_WINDOW = 4096


class Request(NamedTuple):
    """One request that is over."""

    at: float
    caller: str
    failed: bool
    """Whether the server is to blame."""
    streamed: bool
    seconds: float | None
    """Until the first byte, if there was one."""


@dataclass(frozen=True)
class Figures:
    """What a version did in the window."""

    requests: int
    failures: int
    medians: Mapping[bool, tuple[int, float]]
    """Number and median of the times to the first byte in seconds, of whole answers (False) and streams (True)."""
    callers: frozenset[str]
    """Who asked."""

    @property
    def error_rate(self) -> float:
        """Share of failed requests."""
        return self.failures / self.requests if self.requests else 0.0


class Window:
    """The latest requests of one version. To add one costs the same however many there are."""

    def __init__(self) -> None:
        self._requests: deque[Request] = deque(maxlen=LONGEST_WINDOW)
        self._asked: dict[str, float] = {}
        """When each caller asked last, which a flood of another's requests does not wash away."""

    def add(self, request: Request) -> None:
        """One more."""
        self._requests.append(request)
        self._asked[request.caller] = request.at

    def __len__(self) -> int:
        return len(self._requests)

    def figures(self, since: float, *, without: str | None = None) -> Figures:
        """What was since then, leaving one caller out."""
        kept = [request for request in self._requests if request.at >= since and request.caller != without]
        times: dict[bool, list[float]] = {False: [], True: []}
        for request in kept:
            if request.seconds is not None:
                times[request.streamed].append(request.seconds)
        medians = {kind: (len(found), statistics.median(found)) for kind, found in times.items() if found}
        callers = frozenset(caller for caller, at in self._asked.items() if at >= since and caller != without)
        return Figures(len(kept), sum(request.failed for request in kept), medians, callers)

    def heaviest(self, since: float, weighs: Callable[[Request], bool]) -> str:
        """The caller with most requests that weigh."""
        counts = Counter(request.caller for request in self._requests if request.at >= since and weighs(request))
        return counts.most_common(1)[0][0]
