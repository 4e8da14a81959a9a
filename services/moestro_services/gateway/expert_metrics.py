"""`ExpertMetrics`: how the experts of served models are used, from the routes of a sample of the requests.

The proxy hands every request and its answer to `answered`, which decides by the request's number whether to look at
it and returns at once. What is chosen waits in a short queue for one thread, which decodes the routes and counts them
(`expert_metrics_answers`) into a state of fixed size per version (`expert_metrics_window`). Nothing that goes wrong
there reaches the proxy: it is counted by reason. /metrics and /api read figures of a sliding window
(`expert_metrics_series`, `expert_metrics_api`).

vLLM puts no routes into streams. A sampled stream is asked again for the routes of its prompt, if `ask` is given and
the model's server is idle enough; what it sampled stays unseen.
"""

import itertools
import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from prometheus_client import Metric

from moestro.errors import MoestroError
from moestro_services.gateway.deployments import Deployment
from moestro_services.gateway.expert_metrics_answers import check_unsteered, count_answer
from moestro_services.gateway.expert_metrics_asking import Ask, asked_again
from moestro_services.gateway.expert_metrics_known import Known
from moestro_services.gateway.expert_metrics_sampling import NotCountedError, Reason, Sampling
from moestro_services.gateway.expert_metrics_series import describe, families
from moestro_services.gateway.expert_metrics_window import Figures, Seen, VersionTraffic, figures

PATHS = frozenset({"/v1/completions", "/v1/chat/completions"})
PROFILE_SECONDS = 300.0
"""How long after a version was found without a profile it is looked for again."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """One version's figures."""

    seen: Seen
    """The counts they come from."""
    figures: Figures | None
    """None while the window holds too little."""


class ExpertMetrics:
    """Takes samples as one of the proxy's `answered`, and is a collector for a Prometheus registry.

    A context manager that ends its thread; what still waits then is dropped. Safe to use from any thread.
    """

    def __init__(
        self,
        known: Known,
        *,
        sampling: Sampling | None = None,
        ask: Ask | None = None,
        in_flight: Callable[[Deployment], int] = lambda _: 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`ask` asks streams again, off the event loop; `in_flight` tells how many requests a version's server answers
        now. Both may raise a `MoestroError`."""
        self.sampling = sampling or Sampling()
        self._known, self._ask, self._in_flight, self._clock = known, ask, in_flight, clock
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._versions: OrderedDict[str, VersionTraffic | None] = OrderedDict()
        self._reports: dict[str, tuple[tuple[object, ...], Figures | None]] = {}
        self._trouble: dict[str, str] = {}
        self._skipped: Counter[Reason] = Counter()
        self._waiting = self._waiting_bytes = 0
        self._closed = False
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="experts")

    def answered(self, deployment: Deployment, path: str, request: bytes, answer: bytes | None) -> None:
        """Look at the request, if it is chosen: `request` as it went to vLLM, `answer` None for a stream."""
        if path not in PATHS or not self.sampling.chooses(next(self._numbers)):
            return
        if answer is None and self._ask is None:
            self._skip(Reason.NOT_ASKED)
            return
        size = len(request) + len(answer or b"")
        with self._lock:
            full = (
                self._closed
                or self._waiting >= self.sampling.queue_requests
                or self._waiting_bytes + size > self.sampling.queue_bytes
            )
            if full:
                self._skipped[Reason.QUEUE_FULL] += 1
                return
            try:
                done = self._worker.submit(self._take, deployment, path, request, answer)
            except RuntimeError:  # no thread to be had, or the interpreter ends
                self._skipped[Reason.ERROR] += 1
                return
            self._waiting += 1
            self._waiting_bytes += size
        done.add_done_callback(lambda future: self._finished(future, size))

    def skipped(self) -> Mapping[Reason, int]:
        """Chosen requests that were not counted, by reason."""
        with self._lock:
            return {reason: self._skipped[reason] for reason in Reason}

    def reports(self) -> tuple[Report, ...]:
        """Figures of every version that was sampled, by name and version."""
        with self._lock:
            now = self._clock()
            all_seen = [version.seen(now) for version in self._versions.values() if version is not None]
        all_seen.sort(key=lambda seen: (seen.deployment.name, seen.deployment.version))
        return tuple(Report(seen, self._figures(seen)) for seen in all_seen)

    def collect(self) -> Iterator[Metric]:
        """The time series, for a Prometheus registry."""
        reports = [(report.seen, report.figures) for report in self.reports()]
        return families(reports, self.skipped(), max_series=self.sampling.max_series)

    def describe(self) -> Iterator[Metric]:
        """The series' names, for a Prometheus registry."""
        return describe()

    def drain(self) -> None:
        """Wait until everything that waits now is counted."""
        self._worker.submit(lambda: None).result()

    def close(self) -> None:
        """End the thread, once it is through with what it is at."""
        with self._lock:
            self._closed = True
        self._worker.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "ExpertMetrics":
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def _take(self, deployment: Deployment, path: str, request: bytes, answer: bytes | None) -> None:
        try:
            check_unsteered(request)
            version = self._version(deployment)
            source = "answer" if answer is not None else "asked_again"
            if answer is None:
                request, answer = self._again(deployment, path, request)
            counted = count_answer(request, answer, version.shape)
        except NotCountedError as error:
            self._skip(error.reason)
            return
        with self._lock:
            version.add(counted, source, self._clock())

    def _again(self, deployment: Deployment, path: str, request: bytes) -> tuple[bytes, bytes]:
        """The request for the routes of a stream's prompt, and the answer to it."""
        assert self._ask is not None
        again = asked_again(request)
        try:
            if self._in_flight(deployment) > self.sampling.idle_requests:
                raise NotCountedError(Reason.BUSY)
            return again, self._ask(deployment, path, again)
        except MoestroError:
            raise NotCountedError(Reason.ASK_FAILED) from None

    def _version(self, deployment: Deployment) -> VersionTraffic:
        """What was seen of a version; looks up what is known of it when it is new. On the worker's thread alone."""
        label = deployment.label
        try:
            if label not in self._versions:
                shape = self._known.shape(deployment)
                self._remember(label, VersionTraffic(deployment, shape, self.sampling) if shape else None)
            version = self._versions[label]
            if version is None:
                raise NotCountedError(Reason.NO_ROUTING)
            if version.profile is None and self._clock() >= version.profile_due:
                version.profile_due = self._clock() + PROFILE_SECONDS
                version.compare_with(self._known.profile(deployment))
                self._trouble.pop(label, None)
        except MoestroError as error:
            self._tell(label, str(error))
            raise NotCountedError(Reason.LOST) from None
        with self._lock:
            self._versions.move_to_end(label)
        return version

    def _tell(self, label: str, trouble: str) -> None:
        """Log why nothing is known of a version, if it is news."""
        if self._trouble.get(label) != trouble:
            _log.warning("Experts of %s: %s", label, trouble)
        self._trouble[label] = trouble

    def _remember(self, label: str, version: VersionTraffic | None) -> None:
        with self._lock:
            self._versions[label] = version
            while len(self._versions) > self.sampling.max_versions:
                forgotten, _ = self._versions.popitem(last=False)
                self._reports.pop(forgotten, None)

    def _figures(self, seen: Seen) -> Figures | None:
        """Figures of a window, formed again only when it changed."""
        label = seen.deployment.label
        profile = seen.profile.fingerprint if seen.profile else ""
        state = (seen.total_tokens, seen.window.tokens, profile)
        with self._lock:
            known = self._reports.get(label)
        if known and known[0] == state:
            return known[1]
        found = figures(seen, self.sampling)
        with self._lock:
            if label in self._versions:
                self._reports[label] = (state, found)
        return found

    def _skip(self, reason: Reason) -> None:
        with self._lock:
            self._skipped[reason] += 1

    def _finished(self, future: "Future[None]", size: int) -> None:
        with self._lock:
            self._waiting -= 1
            self._waiting_bytes -= size
        error = None if future.cancelled() else future.exception()
        if error is not None:
            self._skip(Reason.ERROR)
            _log.error("A sampled request was not counted.", exc_info=error)
