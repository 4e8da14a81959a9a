"""What a home's gateway is made of: door and log, management, steering and the figures of experts, put together."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.types import ASGIApp

from moestro.registry import ModelRegistry
from moestro_flows.home import Home
from moestro_services.audit import Audit
from moestro_services.gateway.app import Parts, create_app
from moestro_services.gateway.deployments import Deployment
from moestro_services.gateway.door import Door
from moestro_services.gateway.expert_metrics import ExpertMetrics
from moestro_services.gateway.expert_metrics_api import expert_traffic
from moestro_services.gateway.expert_metrics_asking import Asking
from moestro_services.gateway.expert_metrics_known import KnownAtHome
from moestro_services.gateway.expert_metrics_sampling import Sampling
from moestro_services.gateway.fleet import Fleet
from moestro_services.gateway.keys import KeyRing
from moestro_services.gateway.lifecycles import lifecycles
from moestro_services.gateway.lifecycles_feed import Feeds
from moestro_services.gateway.limits import Limits
from moestro_services.gateway.management import management
from moestro_services.gateway.management_parts import ManagementParts
from moestro_services.gateway.openapi import describe
from moestro_services.gateway.requests_log import Logged, RequestLog
from moestro_services.gateway.steering import Steering
from moestro_services.gateway.traffic import Traffic
from moestro_services.gateway.watch import RollbackRule, Watch
from moestro_services.promotion import Promotions

ACTOR = "gateway"


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Whom the gateway lets in, and what it does of its own accord."""

    keys: KeyRing | None
    """Keys that requests must bear; None asks for none, which is for loopback alone."""
    limits: Limits = field(default_factory=Limits)
    """Of every key that has no others."""
    rule: RollbackRule | None = None
    """When a new version is rolled back; None never does."""
    sampling: Sampling = field(default_factory=Sampling)
    """What share of the traffic tells how experts are used."""


@dataclass(frozen=True)
class Assembled:
    """The application, and what its server tells of requests that never reach it."""

    app: ASGIApp
    traffic: Traffic
    described: Callable[[], dict[str, Any]]
    """The OpenAPI document."""


@contextmanager
def assembled(
    home: Home, fleet: Fleet, policy: Policy, steering: Steering, feeds: Feeds | None = None
) -> Iterator[Assembled]:
    """The whole gateway of `home` before `fleet`; ends what runs beside it when the block is left.

    Lifecycles are those of `feeds`, or else processes of the `moestro` command.
    """
    audit = Audit.of(home)
    promotions = Promotions(home, audit, changed=fleet.kick)
    models = ModelRegistry(home.mlflow_uri, home.mlflow_files)
    managed = ManagementParts(home=home, fleet=fleet, models=models, promotions=promotions, audit=audit)
    watch = _watch(policy.rule, promotions)
    if watch:
        fleet.watchers.append(watch.follow)
    asking = Asking(fleet.where)
    metrics = ExpertMetrics(
        KnownAtHome(home), sampling=policy.sampling, ask=asking, in_flight=partial(in_flight, fleet)
    )
    with metrics:
        parts = Parts(
            home=home,
            fleet=fleet,
            watch=watch,
            answered=(metrics,),
            preparing=(steering,),
            collectors=(metrics,),
            routers=(management(managed), lifecycles(managed, feeds), expert_traffic(metrics)),
            wraps=(partial(_door, policy),),
        )
        app = create_app(parts)
        describe(app)
        try:
            yield Assembled(Logged(app, log=RequestLog.of(home)), app.state.traffic, app.openapi)
        finally:
            asking.close()


def in_flight(fleet: Fleet, deployment: Deployment) -> int:
    """Requests that the server of `deployment` is answering."""
    return sum(state.in_flight for state in fleet.replicas() if state.fingerprint == deployment.fingerprint)


def _watch(rule: RollbackRule | None, promotions: Promotions) -> Watch | None:
    def roll_back(name: str, version: str, reason: str) -> bool:
        return promotions.rollback(name, reason=reason, actor=ACTOR, version=version).changed

    return Watch(rule, roll_back) if rule else None


def _door(policy: Policy, app: ASGIApp, traffic: Traffic) -> ASGIApp:
    return Door(app, keys=policy.keys, limits=policy.limits, counted=traffic.refused)
