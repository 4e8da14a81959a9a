"""Automatic rollback: a version that is new to traffic is judged by its answers against the one it takes traffic from.

A canary is judged against the champion while both answer; a version that became champion, for some minutes, against
what its predecessor did before. Requests that a version's lost process leaves unanswered are failures of it; a model's
own 4xx and clients that leave count for nobody.
"""

import logging
import statistics
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from moestro.errors import MoestroError, told
from moestro.registry.model_versions import CHALLENGER, PREVIOUS
from moestro_services.gateway.routes import Route

LOG = logging.getLogger(__name__)
LONGEST_WINDOW = 4096
CHECK_SECONDS = 1.0

Key = tuple[str, str]
RollBack = Callable[[str, str, str], object]
"""Rolls a model back: its name, the version that is to go, and the reason in words."""


@dataclass(frozen=True)
class RollbackRule:
    """When a new version is taken back."""

    min_requests: int = 50
    """Answers before anything is judged, of the new version and, for latency, of the other as well."""
    max_error_excess: float = 0.05
    """How much larger the share of failed requests may be than the other version's."""
    max_latency_ratio: float = 2.0
    """How many times the other's the median time to the first byte may be."""
    latency_slack_seconds: float = 0.05
    """What it may be longer in any case."""
    window_seconds: float = 300.0
    """How old the requests may be that count."""
    champion_minutes: float = 10.0
    """How long a new champion is judged."""


@dataclass(frozen=True)
class Figures:
    """What a version did in the window."""

    requests: int
    failures: int
    medians: Mapping[bool, tuple[int, float]]
    """Number and median of the times to the first byte in seconds, of whole answers (False) and streams (True)."""

    @property
    def error_rate(self) -> float:
        """Share of failed requests."""
        return self.failures / self.requests if self.requests else 0.0


class _Window:
    """The latest requests of one version: when, whether failed, whether streamed, seconds to the first byte."""

    def __init__(self) -> None:
        self._requests: deque[tuple[float, bool, bool, float | None]] = deque(maxlen=LONGEST_WINDOW)

    def add(self, now: float, failed: bool, streamed: bool, seconds: float | None) -> None:
        self._requests.append((now, failed, streamed, seconds))

    def __len__(self) -> int:
        return len(self._requests)

    def figures(self, since: float) -> Figures:
        kept = [request for request in list(self._requests) if request[0] >= since]
        times: dict[bool, list[float]] = {False: [], True: []}
        for _, _, streamed, seconds in kept:
            if seconds is not None:
                times[streamed].append(seconds)
        medians = {kind: (len(found), statistics.median(found)) for kind, found in times.items() if found}
        return Figures(len(kept), sum(failed for _, failed, _, _ in kept), medians)


@dataclass
class _Suspect:
    version: str
    against: str | Figures
    """The version it is judged against, or what that did before it lost its traffic."""
    until: float
    window: _Window = field(default_factory=_Window)
    checked: float = float("-inf")
    acted: bool = False


class Watch:
    """Hears of every answer (`answered`) and of every new table (`follow`), and rolls back, once per new version."""

    def __init__(
        self,
        rule: RollbackRule,
        roll_back: RollBack,
        *,
        clock: Callable[[], float] = time.monotonic,
        failures: tuple[type[Exception], ...] = (),
    ) -> None:
        """`roll_back` is called in a thread of its own; `failures` are what it may raise beside `MoestroError`."""
        self.rule = rule
        self.rollbacks: Counter[str] = Counter()
        """Automatic rollbacks by model."""
        self._roll_back = roll_back
        self._clock = clock
        self._failures: tuple[type[Exception], ...] = (MoestroError, OSError, *failures)
        self._windows: dict[Key, _Window] = {}
        self._suspects: dict[str, _Suspect] = {}
        self._champions: dict[str, str] = {}
        self._tried: set[Key] = set()
        self._lock = threading.Lock()

    def answered(self, name: str, version: str, *, failed: bool, streamed: bool, seconds: float | None) -> None:
        """A request is over: whether the server failed, and its time to the first byte if there was one."""
        now = self._clock()
        with self._lock:
            window = self._windows.setdefault((name, version), _Window())
            window.add(now, failed, streamed, seconds)
            suspect = self._suspects.get(name)
            if suspect is None or suspect.version != version or suspect.acted:
                return
            suspect.window.add(now, failed, streamed, seconds)
            if len(suspect.window) < self.rule.min_requests or now - suspect.checked < CHECK_SECONDS:
                return
            suspect.checked = now
            reason = self._verdict(name, suspect, now)
            suspect.acted = bool(reason)
        if reason:
            threading.Thread(target=self._act, args=(name, suspect, reason), name="rollback", daemon=True).start()

    def follow(self, table: Mapping[str, Route]) -> None:
        """Traffic goes by `table` now."""
        with self._lock:
            for route in table.values():
                self._follow(route)
            for name in self._suspects.keys() - table.keys():
                del self._suspects[name]
            for key in [key for key in self._windows if key[0] not in table]:
                del self._windows[key]

    def _follow(self, route: Route) -> None:
        champion = route.champion.version.version if route.champion else ""
        before = self._champions.get(route.name)
        self._champions[route.name] = champion
        suspect = self._suspects.get(route.name)
        if route.canary_share > 0:
            challenger = route.aliases[CHALLENGER].version.version
            if suspect is None or (suspect.version, suspect.against) != (challenger, champion):
                self._suspects[route.name] = _Suspect(challenger, champion, float("inf"))
            return
        if suspect and suspect.against == champion and _is_away(route, suspect.version):
            return  # a canary whose process is started again is one all the same, and its failures count
        fresh = before and champion != before and (route.name, champion) not in self._tried
        self._tried.add((route.name, champion))
        if fresh and PREVIOUS in route.aliases:
            now = self._clock()
            did = self._windows.get((route.name, before or ""), _Window()).figures(now - self.rule.window_seconds)
            self._suspects[route.name] = _Suspect(champion, did, now + self.rule.champion_minutes * 60)
        elif suspect and (suspect.version != champion or isinstance(suspect.against, str)):
            del self._suspects[route.name]

    def _verdict(self, name: str, suspect: _Suspect, now: float) -> str:
        """Why `suspect` is to go; empty if it may stay."""
        if now > suspect.until:
            return ""
        rule, since = self.rule, now - self.rule.window_seconds
        mine = suspect.window.figures(since)
        other = suspect.against
        if isinstance(other, str):
            other = self._windows.get((name, other), _Window()).figures(since)
        if mine.requests < rule.min_requests:
            return ""
        if mine.error_rate > other.error_rate + rule.max_error_excess:
            return (
                f"{mine.failures} of {mine.requests} requests to version {suspect.version} failed "
                f"({mine.error_rate:.1%}; the other version: {other.error_rate:.1%})."
            )
        for streamed, (count, median) in mine.medians.items():
            others, theirs = other.medians.get(streamed, (0, 0.0))
            bound = max(theirs * rule.max_latency_ratio, theirs + rule.latency_slack_seconds)
            if min(count, others) >= rule.min_requests and median > bound:
                return (
                    f"Version {suspect.version} takes {median * 1000:.0f} ms to the first byte in the median, "
                    f"the other version {theirs * 1000:.0f} ms."
                )
        return ""

    def _act(self, name: str, suspect: _Suspect, reason: str) -> None:
        LOG.warning("Rolling %s back: %s", name, reason)
        try:
            self._roll_back(name, suspect.version, reason)
        except self._failures as error:
            LOG.warning("Rolling %s back failed: %s", name, told(error))
            suspect.acted = False
        else:
            self.rollbacks[name] += 1


def _is_away(route: Route, version: str) -> bool:
    """Whether `version` is the challenger and does not answer now."""
    challenger = route.aliases.get(CHALLENGER)
    return challenger is not None and challenger.version.version == version and not challenger.serving
