"""What /metrics tells: requests by route, model and status, their times, and whether models answer."""

import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moestro_services.gateway.deployments import Deployment

MODEL = "moestro.model"
"""Key of the request's scope under which the proxy leaves the model's name."""
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
DISCONNECTED = "499"


class Traffic:
    """The gateway's metrics, in a registry of its own."""

    def __init__(self, deployments: Sequence[Deployment]) -> None:
        self.registry = CollectorRegistry()
        self._deployments = deployments
        self.requests = Counter(
            "moestro_gateway_requests",
            "Answered requests; status 499: the client left first.",
            ["route", "model", "status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "moestro_gateway_request_seconds",
            "Time until the last byte.",
            ["route", "model"],
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.first_byte = Histogram(
            "moestro_gateway_first_byte_seconds",
            "Time until the first byte.",
            ["route", "model"],
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.in_flight = Gauge("moestro_gateway_requests_in_flight", "Requests being answered.", registry=self.registry)
        self.up = Gauge(
            "moestro_gateway_model_up", "Whether the model's server answers.", ["model"], registry=self.registry
        )

    def exposition(self) -> bytes:
        """The metrics in Prometheus' text format; asks every model's server whether it is well."""
        for deployment in self._deployments:
            self.up.labels(deployment.name).set(deployment.server.healthy())
        return generate_latest(self.registry)


class Observed:
    """ASGI middleware that counts and times requests."""

    def __init__(self, app: ASGIApp, traffic: Traffic) -> None:
        self.app = app
        self.traffic = traffic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        status, first = DISCONNECTED, 0.0

        async def watch(message: Message) -> None:
            nonlocal status, first
            if message["type"] == "http.response.start":
                status = str(message["status"])
            elif not first:
                first = time.perf_counter()
            await send(message)

        with self.traffic.in_flight.track_inprogress():
            try:
                await self.app(scope, receive, watch)
            finally:
                labels = (getattr(scope.get("route"), "path", "other"), scope.get(MODEL, ""))
                self.traffic.requests.labels(*labels, status).inc()
                self.traffic.seconds.labels(*labels).observe(time.perf_counter() - started)
                if first:
                    self.traffic.first_byte.labels(*labels).observe(first - started)
