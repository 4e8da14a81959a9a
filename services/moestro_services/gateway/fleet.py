"""`Fleet`: the model servers this gateway runs, and who answers for which name.

`apply` says what the registry wants. Names move to another version only when that one answers, and what nobody is sent
to any more is drained and ended, so that a switch fails no request.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from moestro.errors import ResourceError
from moestro.registry.model_versions import CHALLENGER, CHAMPION, PREVIOUS, ModelVersion, RegisteredModel
from moestro_services.gateway.deployments import Deployment
from moestro_services.gateway.errors import UnavailableError
from moestro_services.gateway.replica import Backoff, Endpoint, Opener, Replica, State
from moestro_services.gateway.routes import ALIASES, Route, resolve

DRAIN_SECONDS = 300.0
TRIES = 3

Key = tuple[str, str, str]
Table = Mapping[str, Route]


@dataclass(frozen=True)
class ReplicaState:
    """How one version's process stands."""

    name: str
    version: str
    aliases: tuple[str, ...]
    """Names that lead to it now."""
    fingerprint: str
    state: State
    in_flight: int
    restarts: int
    port: int
    """0 while it does not answer."""
    reason: str
    """Why it is lost."""


class Fleet:
    """All replicas. Every method may be called from any thread; `target` and `enter` never wait."""

    def __init__(
        self,
        opener: Opener,
        *,
        backoff: Backoff | None = None,
        drain_seconds: float = DRAIN_SECONDS,
        make: Callable[..., Replica] = Replica,
    ) -> None:
        """`make` builds a replica as `Replica` does."""
        self.kicked = threading.Event()
        """Set when somebody wants the registry looked at now."""
        self.switches: dict[str, int] = {}
        """How often a model's champion changed, by name."""
        self.watchers: list[Callable[[Table], None]] = []
        """Called with every new table, in order."""
        self.registry_up = False
        """Whether the model registry could be read when it was asked last; `Controller` says so."""
        self._opener = opener
        self._backoff = backoff or Backoff()
        self._drain_seconds = drain_seconds
        self._make = make
        self._models: tuple[RegisteredModel, ...] | None = None
        self._table: Table = MappingProxyType({})
        self._replicas: dict[Key, Replica] = {}
        self._leaving: dict[Key, Replica] = {}
        self._closed = False
        self._lock = threading.Condition(threading.RLock())

    @property
    def table(self) -> Table:
        """Who answers for which name now."""
        return self._table

    @property
    def known(self) -> bool:
        """Whether it was ever said what is to be served. Until then nothing is told of any model."""
        return self._models is not None

    @property
    def all_answer(self) -> bool:
        """Whether it is known what is to be served, and every model's champion answers."""
        return self.known and all(self.ready.values())

    def check_known(self) -> None:
        """Raise `UnavailableError` while nothing is known of any model."""
        if not self.known:
            raise UnavailableError("Nothing is known of any model yet: the model registry did not answer so far.")

    def target(self, model: str, sticky: str) -> Replica:
        """The replica that answers `model`: a name, `name@alias` or `name@version`; `sticky` decides about canaries.

        Raises `UnknownModelError` or `UnavailableError`.
        """
        self.check_known()
        return resolve(self._table, model, sticky)

    def enter(self, model: str, sticky: str) -> tuple[Replica, Endpoint]:
        """Like `target`, with the request counted; `leave` of the replica must follow."""
        for _ in range(TRIES):
            replica = self.target(model, sticky)
            endpoint = replica.enter()
            if endpoint is not None:
                return replica, endpoint
        raise UnavailableError(f"The model {model!r} does not answer now.", version=replica.version.version)

    def replicas(self) -> tuple[ReplicaState, ...]:
        """How all processes stand, those that are draining last."""
        with self._lock:
            return tuple(map(self._told, (*self._replicas.values(), *self._leaving.values())))

    def where(self, deployment: Deployment) -> Endpoint:
        """Where a version's server answers now; raises `ResourceError` if it does not."""
        with self._lock:
            for replica in (*self._replicas.values(), *self._leaving.values()):
                if replica.deployment == deployment and (endpoint := replica.endpoint) is not None:
                    return endpoint
        raise ResourceError(f"The server of {deployment.label} does not answer now.")

    def endpoints(self) -> tuple[Endpoint, ...]:
        """Where processes answer, those that are draining included."""
        with self._lock:
            replicas = (*self._replicas.values(), *self._leaving.values())
            return tuple(replica.endpoint for replica in replicas if replica.endpoint is not None)

    def kick(self) -> None:
        """Look at the registry now."""
        self.kicked.set()

    def apply(self, models: Sequence[RegisteredModel]) -> None:
        """Make traffic follow `models`. Does not wait for servers to start or drain."""
        with self._lock:
            if tuple(models) != self._models:
                self._models = tuple(models)
                self._settle()

    def wait_for(self, predicate: Callable[["Fleet"], bool], timeout: float | None = None) -> bool:
        """Wait until `predicate` holds, which is asked whenever a replica's state changes; whether it does."""
        with self._lock:
            return self._lock.wait_for(lambda: predicate(self), timeout)

    @property
    def ready(self) -> dict[str, bool]:
        """Whether each model's champion answers."""
        routes = self._table.values()
        return {route.name: route.champion.serving for route in routes if route.champion is not None}

    def close(self) -> None:
        """End all processes and wait until they have."""
        with self._lock:
            self._closed = True
            replicas = [*self._replicas.values(), *self._leaving.values()]
        ending = [threading.Thread(target=replica.retire, args=(0.0,)) for replica in replicas]
        for thread in ending:
            thread.start()
        for thread in ending:
            thread.join()

    def __enter__(self) -> "Fleet":
        """The fleet."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def _told(self, replica: Replica) -> ReplicaState:
        version = replica.version
        route = self._table.get(version.name)
        aliases = route.aliases.items() if route else ()
        return ReplicaState(
            name=version.name,
            version=version.version,
            aliases=tuple(alias for alias, found in aliases if found is replica),
            fingerprint=version.fingerprint,
            state=replica.state,
            in_flight=replica.in_flight,
            restarts=replica.restarts,
            port=replica.port,
            reason=replica.reason,
        )

    def _settle(self) -> None:
        """Start what is wanted, move names to what answers, let go of what nobody is sent to."""
        with self._lock:
            if not self._closed:
                before, table = self._table, {model.name: self._route(model) for model in self._models or ()}
                self._table = MappingProxyType(table)
                used = {replica for route in table.values() for replica in route.versions.values()}
                for key, replica in list(self._replicas.items()):
                    if replica not in used:
                        self._retire(key)
                self._tell(before)
            self._lock.notify_all()

    def _wanted(self, model: RegisteredModel) -> list[ModelVersion]:
        """The versions that are to have a process: the previous champion only if it has one."""
        found = [model.aliased(alias) for alias in (CHAMPION, CHALLENGER)]
        previous = model.aliased(PREVIOUS)
        if previous is not None and _key(previous) in self._replicas:
            found.append(previous)
        return [version for version in found if version is not None]

    def _replica(self, version: ModelVersion) -> Replica:
        """The replica of `version`, made or called back if it has none."""
        key = _key(version)
        if key not in self._replicas:
            leaving = self._leaving.pop(key, None)
            if leaving is None or not leaving.resume():
                leaving = self._make(version, self._opener, changed=self._settle, backoff=self._backoff)
            self._replicas[key] = leaving
        return self._replicas[key]

    def _route(self, model: RegisteredModel) -> Route:
        wanted_now = [self._replica(version) for version in self._wanted(model)]
        before = self._table.get(model.name)
        aliases: dict[str, Replica] = {}
        moved = set()
        for alias in ALIASES:
            version = model.aliased(alias)
            wanted = self._replicas.get(_key(version)) if version else None
            held = before.aliases.get(alias) if before else None
            if wanted is None:
                continue
            keep = not wanted.serving and held is not None and held.serving
            aliases[alias] = held if keep and held is not None else wanted
            if not keep and wanted.serving:
                moved.add(alias)
        used = dict.fromkeys((*wanted_now, *aliases.values()))
        challenger = model.aliased(CHALLENGER)
        return Route(
            name=model.name,
            aliases=MappingProxyType(aliases),
            versions=MappingProxyType({replica.version.version: replica for replica in used}),
            registered=frozenset(version.version for version in model.versions),
            canary_share=model.canary_share if CHALLENGER in moved else 0.0,
            canary=self._replica(challenger) if challenger and model.canary_share else None,
        )

    def _tell(self, before: Table) -> None:
        for name, route in self._table.items():
            old = before[name].champion if name in before else None
            if old is not None and route.champion is not old:
                self.switches[name] = self.switches.get(name, 0) + 1
        for watcher in self.watchers:
            watcher(self._table)

    def _retire(self, key: Key) -> None:
        replica = self._leaving[key] = self._replicas.pop(key)

        def leave() -> None:
            if replica.retire(self._drain_seconds):
                with self._lock:
                    if self._leaving.get(key) is replica:
                        del self._leaving[key]
                    self._lock.notify_all()

        threading.Thread(target=leave, name=f"drain {replica.label}", daemon=True).start()


def _key(version: ModelVersion) -> Key:
    return version.name, version.version, version.fingerprint
