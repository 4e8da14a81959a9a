"""Automatic rollback: a version that is new to traffic is judged by its answers against the one it takes traffic from.

A canary is judged against the champion while both answer; a version that became champion, for some minutes, against
what its predecessor did before, also beside a canary. Requests that a version's lost process leaves unanswered are
failures of it; a model's own 4xx and clients that leave count for nobody. What one caller sees is borne out by others
before it counts. A canary whose process is started again and again is ended, whether anybody asked it or not.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from moestro.errors import MoestroError, told
from moestro.registry.model_versions import PREVIOUS
from moestro_services.gateway.replica import Replica
from moestro_services.gateway.routes import Route
from moestro_services.gateway.watch_window import Figures, Request, Window

LOG = logging.getLogger(__name__)
CHECK_SECONDS = 1.0
RETRY_SECONDS = 30.0
"""Rest after a rollback that failed."""

Key = tuple[str, str]
RollBack = Callable[[str, str, str], bool]
"""Rolls a model back: its name, the version that is to go, and the reason in words. Whether that changed anything."""


@dataclass(frozen=True)
class RollbackRule:
    """When a new version is taken back.

    What one caller's own requests show is not enough. Who weighs most in a verdict (has most of the failures,
    or of the slow answers) is left out, and it must hold for the rest too, by `min_borne_out` failures or answers of
    them at least. One caller's word counts where there is no other: nobody else asked either version within the window,
    or nobody else asked the new one though it has been judged for a whole window. A caller who makes the process end,
    or slows it down for all, is seen by the others' requests and by its restarts.
    """

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
    min_borne_out: int = 3
    """Failures, or answers where latency is judged, of others than the caller who weighs most."""
    max_restarts: int = 3
    """How often a canary's process is started again before the canary is ended, whether anybody asked it or not."""


@dataclass
class _Suspect:
    version: str
    against: str | Figures
    """The version it is judged against, or what that did before it lost its traffic."""
    since: float
    until: float
    window: Window = field(default_factory=Window)
    restarts: int = 0
    """How often its process had been started again when it became a canary."""
    begun: bool = True
    """Whether it has answered as what it is. A first start, however long, is no failure."""
    checked: float = float("-inf")
    acted: bool = False


class Watch:
    """Hears of every answer (`answered`) and of every new table (`follow`), and rolls back, once per new version."""

    def __init__(self, rule: RollbackRule, roll_back: RollBack, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`roll_back` is called in a thread of its own and may raise `MoestroError` and `OSError`."""
        self.rule = rule
        self.rollbacks: Counter[str] = Counter()
        """Automatic rollbacks by model."""
        self._roll_back = roll_back
        self._clock = clock
        self._windows: dict[Key, Window] = {}
        self._suspects: dict[Key, _Suspect] = {}
        self._champions: dict[str, str] = {}
        self._tried: set[Key] = set()
        """Versions that were champion once."""
        self._lock = threading.Lock()

    def answered(
        self, name: str, version: str, *, caller: str, failed: bool, streamed: bool, seconds: float | None
    ) -> None:
        """A request of `caller` is over: whether the server failed, and its time to the first byte if there was one."""
        now = self._clock()
        request = Request(now, caller, failed, streamed, seconds)
        with self._lock:
            window = self._windows.get((name, version))
            if window is None:
                window = self._windows[name, version] = Window()
            window.add(request)
            suspect = self._suspects.get((name, version))
            if suspect is None or suspect.acted or not suspect.begun:
                return
            suspect.window.add(request)
            if len(suspect.window) < self.rule.min_requests or now - suspect.checked < CHECK_SECONDS:
                return
            suspect.checked = now
            reason = self._verdict(name, suspect, now)
            if reason:
                self._start(name, suspect, reason)

    def follow(self, table: Mapping[str, Route]) -> None:
        """Traffic goes by `table` now."""
        with self._lock:
            for route in table.values():
                self._follow(route)
            for kept in (self._suspects, self._windows):
                for key in [key for key in kept if key[0] not in table]:
                    del kept[key]
            self._tried = {key for key in self._tried if key[0] in table}
            self._champions = {name: version for name, version in self._champions.items() if name in table}

    def _follow(self, route: Route) -> None:
        champion = route.champion.version.version if route.champion else ""
        canary = route.canary.version.version if route.canary else ""
        self._follow_champion(route, champion)
        if route.canary is not None and canary != champion:
            self._follow_canary(route, route.canary, champion)
        for key in [key for key in self._suspects if key[0] == route.name and key[1] not in (champion, canary)]:
            del self._suspects[key]

    def _follow_champion(self, route: Route, champion: str) -> None:
        """A version is judged as champion once, when it becomes one for the first time."""
        key, before = (route.name, champion), self._champions.get(route.name)
        self._champions[route.name] = champion
        fresh = before and champion != before and key not in self._tried
        self._tried.add(key)
        suspect = self._suspects.get(key)
        if fresh and PREVIOUS in route.aliases:
            now = self._clock()
            did = self._windows.get((route.name, before or ""), Window()).figures(now - self.rule.window_seconds)
            self._suspects[key] = _Suspect(champion, did, now, now + self.rule.champion_minutes * 60)
        elif suspect and isinstance(suspect.against, str):
            del self._suspects[key]

    def _follow_canary(self, route: Route, canary: Replica, champion: str) -> None:
        """A canary whose process is lost is one all the same, and its failures count."""
        key, now = (route.name, canary.version.version), self._clock()
        suspect = self._suspects.get(key)
        if suspect is None or suspect.against != champion:
            suspect = _Suspect(key[1], champion, now, float("inf"), restarts=canary.restarts, begun=False)
            self._suspects[key] = suspect
        if route.canary_share > 0 and not suspect.begun:
            suspect.begun, suspect.since = True, now
        restarts = canary.restarts - suspect.restarts
        if restarts >= self.rule.max_restarts and not suspect.acted and now >= suspect.checked:
            reason = f"The process of version {suspect.version} was started again {restarts} times."
            self._start(route.name, suspect, reason)

    def _verdict(self, name: str, suspect: _Suspect, now: float) -> str:
        """Why `suspect` is to go; empty if it may stay."""
        if now > suspect.until:
            return ""
        rule, since = self.rule, now - self.rule.window_seconds
        mine = suspect.window.figures(since)
        other = suspect.against
        if isinstance(other, str):
            other = self._windows.get((name, other), Window()).figures(since)
        if mine.requests < rule.min_requests:
            return ""
        return self._errors(suspect, mine, other, now) or self._latency(suspect, mine, other, now)

    def _errors(self, suspect: _Suspect, mine: Figures, other: Figures, now: float) -> str:
        rule, since = self.rule, now - self.rule.window_seconds
        bound = other.error_rate + rule.max_error_excess
        if mine.error_rate <= bound:
            return ""
        most = suspect.window.heaviest(since, lambda request: request.failed)
        rest = suspect.window.figures(since, without=most)
        borne_out = rest.failures >= rule.min_borne_out and rest.error_rate > bound
        if not borne_out and not self._alone(suspect, mine, other, most, now):
            return ""
        return (
            f"{mine.failures} of {mine.requests} requests to version {suspect.version} failed "
            f"({mine.error_rate:.1%}; the other version: {other.error_rate:.1%})."
        )

    def _latency(self, suspect: _Suspect, mine: Figures, other: Figures, now: float) -> str:
        rule, since = self.rule, now - self.rule.window_seconds
        for streamed, (count, median) in mine.medians.items():
            others, theirs = other.medians.get(streamed, (0, 0.0))
            bound = max(theirs * rule.max_latency_ratio, theirs + rule.latency_slack_seconds)
            if min(count, others) < rule.min_requests or median <= bound:
                continue
            most = suspect.window.heaviest(since, partial(_slow, streamed, bound))
            heard, rest = suspect.window.figures(since, without=most).medians.get(streamed, (0, 0.0))
            borne_out = heard >= rule.min_borne_out and rest > bound
            if borne_out or self._alone(suspect, mine, other, most, now):
                return (
                    f"Version {suspect.version} takes {median * 1000:.0f} ms to the first byte in the median, "
                    f"the other version {theirs * 1000:.0f} ms."
                )
        return ""

    def _alone(self, suspect: _Suspect, mine: Figures, other: Figures, caller: str, now: float) -> bool:
        """Whether there is nobody who could bear out what `caller` sees."""
        waited = now - suspect.since >= self.rule.window_seconds
        return mine.callers <= {caller} and (waited or other.callers <= {caller})

    def _start(self, name: str, suspect: _Suspect, reason: str) -> None:
        suspect.acted = True
        threading.Thread(target=self._act, args=(name, suspect, reason), name="rollback", daemon=True).start()

    def _act(self, name: str, suspect: _Suspect, reason: str) -> None:
        LOG.warning("Rolling %s back: %s", name, reason)
        try:
            changed = self._roll_back(name, suspect.version, reason)
        except (MoestroError, OSError) as error:
            LOG.warning("Rolling %s back failed: %s", name, told(error))
            suspect.checked = self._clock() + RETRY_SECONDS
            suspect.acted = False
            return
        if changed:
            with self._lock:
                self.rollbacks[name] += 1


def _slow(streamed: bool, bound: float, request: Request) -> bool:
    return request.streamed is streamed and request.seconds is not None and request.seconds > bound
