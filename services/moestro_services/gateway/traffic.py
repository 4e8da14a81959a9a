"""What /metrics tells: requests by route, model, version and status, their times and tokens, and the model servers."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moestro_services.gateway.deployments import Deployment
from moestro_services.gateway.fleet import Fleet
from moestro_services.gateway.replica import State
from moestro_services.gateway.usage import Usage

MODEL = "moestro.model"
"""Key of the request's scope under which the proxy leaves the model's name."""
VERSION = "moestro.version"
"""Key of the request's scope under which the proxy leaves the number of the version that answers."""
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
DISCONNECTED = "499"


class Traffic:
    """The gateway's metrics, in a registry of its own."""

    def __init__(self, fleet: Fleet, collectors: Sequence[Collector] = ()) -> None:
        """`collectors` are what else /metrics tells."""
        self.registry = CollectorRegistry()
        of_requests = ["route", "model", "version"]
        self.requests = Counter(
            "moestro_gateway_requests",
            "Answered requests; status 499: the client left first.",
            [*of_requests, "status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "moestro_gateway_request_seconds",
            "Time until the last byte.",
            of_requests,
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.first_byte = Histogram(
            "moestro_gateway_first_byte_seconds",
            "Time until the first byte.",
            of_requests,
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.tokens = Counter(
            "moestro_gateway_tokens",
            "Tokens by kind (prompt, completion), as far as answers tell.",
            ["model", "version", "kind"],
            registry=self.registry,
        )
        self.refusals = Counter(
            "moestro_gateway_refusals", "Requests that no model was asked.", ["reason"], registry=self.registry
        )
        self.in_flight = Gauge("moestro_gateway_requests_in_flight", "Requests being answered.", registry=self.registry)
        for collector in (FleetCollector(fleet), *collectors):
            self.registry.register(collector)

    def refused(self, reason: str) -> None:
        """Count a request that got no model's answer."""
        self.refusals.labels(reason).inc()

    def spent(self, deployment: Deployment, usage: Usage) -> None:
        """Count the tokens of an answer."""
        labels = (deployment.name, deployment.version)
        self.tokens.labels(*labels, "prompt").inc(usage.prompt)
        self.tokens.labels(*labels, "completion").inc(usage.completion)

    def exposition(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class FleetCollector(Collector):
    """The model servers, as they stand when asked."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterator[Metric]:
        """One sample for every version that has a process, for every model, and for their registry."""
        by = ["model", "version"]
        up = GaugeMetricFamily("moestro_gateway_model_up", "Whether the version's server answers.", labels=by)
        busy = GaugeMetricFamily("moestro_gateway_model_in_flight", "Requests the server is answering.", labels=by)
        starts = CounterMetricFamily(
            "moestro_gateway_model_restarts", "Times a lost server was started again.", labels=by
        )
        for replica in self._fleet.replicas():
            labels = (replica.name, replica.version)
            up.add_metric(labels, float(replica.state in (State.SERVING, State.DRAINING)))
            busy.add_metric(labels, float(replica.in_flight))
            starts.add_metric(labels, float(replica.restarts))
        champions = GaugeMetricFamily(
            "moestro_gateway_champion_up", "Whether whoever answers for the bare name does.", labels=["model"]
        )
        for model, answers in self._fleet.ready.items():
            champions.add_metric([model], float(answers))
        switches = _counts("moestro_gateway_switches", "Times another version became champion.", self._fleet.switches)
        registry = GaugeMetricFamily(
            "moestro_registry_up",
            "Whether the model registry could be read when it was asked last.",
            value=float(self._fleet.registry_up),
        )
        yield from (up, busy, starts, champions, switches, registry)


class RollbackCollector(Collector):
    """Automatic rollbacks."""

    def __init__(self, rollbacks: Mapping[str, int]) -> None:
        self._rollbacks = rollbacks

    def collect(self) -> Iterator[Metric]:
        """One sample for every model that was rolled back."""
        yield _counts("moestro_gateway_rollbacks", "Automatic rollbacks.", self._rollbacks)


def _counts(name: str, about: str, counts: Mapping[str, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, about, labels=["model"])
    for model, count in list(counts.items()):
        family.add_metric([model], float(count))
    return family


class Observed:
    """ASGI middleware that counts and times requests."""

    def __init__(self, app: ASGIApp, traffic: Traffic, clock: Callable[[], float] = time.perf_counter) -> None:
        self.app = app
        self.traffic = traffic
        self.clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        clock = self.clock
        started = clock()
        status, first = DISCONNECTED, 0.0

        async def watch(message: Message) -> None:
            nonlocal status, first
            if not first:
                if message["type"] == "http.response.start":
                    status = str(message["status"])
                else:
                    first = clock()
            await send(message)

        self.traffic.in_flight.inc()
        try:
            await self.app(scope, receive, watch)
        finally:
            self.traffic.in_flight.dec()
            path = getattr(scope.get("route"), "path", "other")
            labels = (path, scope.get(MODEL, ""), scope.get(VERSION, ""))
            self.traffic.requests.labels(*labels, status).inc()
            self.traffic.seconds.labels(*labels).observe(clock() - started)
            if first:
                self.traffic.first_byte.labels(*labels).observe(first - started)
