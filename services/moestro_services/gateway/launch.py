"""From registered models, or one deployment, to an address: vLLM's servers behind the gateway."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import httpx

from moestro.artifacts import Artifact
from moestro.errors import ResourceError
from moestro_flows.home import Home
from moestro_services.gateway.access import check_exposure
from moestro_services.gateway.assembly import Policy, assembled
from moestro_services.gateway.connections import careful
from moestro_services.gateway.controller import Controller
from moestro_services.gateway.fleet import Fleet, Table
from moestro_services.gateway.listening import listen, serving
from moestro_services.gateway.replica import State
from moestro_services.gateway.sources import Fixed, Source

LOOPBACK = "127.0.0.1"
ASK_SECONDS = 300

Say = Callable[[str], None]


@dataclass(frozen=True)
class Address:
    """Where a gateway listens, and what lets one in."""

    host: str = LOOPBACK
    port: int = 0
    """0 takes a free one."""


@dataclass(frozen=True)
class Running:
    """A gateway that answers."""

    url: str
    fleet: Fleet

    def wait_until_ready(self) -> None:
        """Wait until every model's champion answers, however often it, or the registry, must be tried."""
        self.fleet.wait_for(lambda fleet: fleet.all_answer)

    def wait_for_first_starts(self) -> None:
        """Wait until every model's champion answers; raises `ResourceError` as soon as one cannot be started."""
        self.fleet.wait_for(lambda fleet: all(fleet.ready.values()) or bool(_lost(fleet)))
        if words := _lost(self.fleet):
            raise ResourceError(words)


@contextmanager
def gateway(home: Home, source: Source, at: Address, *, say: Say, policy: Policy | None = None) -> Iterator[Running]:
    """The gateway before the servers of what `source` names, while in the block.

    It answers at once, with 503 for models whose servers are still starting, and for all while `source` cannot be read.
    Raises `BusyError` if the port is in use, before anything is started, and `ConfigError` for a host beyond loopback
    without a key.
    """
    policy = policy or Policy(keys=None)
    check_exposure(at.host, policy.keys)
    with ExitStack() as stack:
        made = listen(at.host, at.port)
        stack.callback(made.close)
        fleet = stack.enter_context(Fleet(source.open))
        fleet.watchers.append(Teller(say).follow)
        assembly = stack.enter_context(assembled(home, fleet, policy, source.steering))
        url = stack.enter_context(serving(assembly.app, made, careful(assembly.traffic.refused)))
        stack.enter_context(Controller(fleet, source.read))
        yield Running(url, fleet)


class Teller:
    """Says in words what becomes of the servers."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._told: dict[str, tuple[State, str]] = {}
        self._champions: dict[str, str] = {}

    def follow(self, table: Table) -> None:
        """Say what is other than before."""
        for route in table.values():
            for replica in route.versions.values():
                now = replica.state, replica.reason
                if self._told.get(replica.label) != now and (words := _words(*now, replica.label, replica.restarts)):
                    self._say(words)
                self._told[replica.label] = now
            champion = route.champion
            if champion is not None and champion.serving:
                before = self._champions.get(route.name, champion.label)
                if before != champion.label:
                    self._say(f"{route.name} is now answered by {champion.label} (before: {before}).")
                self._champions[route.name] = champion.label


def _words(state: State, reason: str, label: str, restarts: int) -> str:
    if state is State.STARTING:
        return f"Starting vLLM for {label} ..." if not restarts else f"Starting vLLM for {label} again ({restarts}) ..."
    return {State.SERVING: f"{label} answers.", State.LOST: f"{label} is lost: {reason}"}.get(state, "")


def _lost(fleet: Fleet) -> str:
    found = [f"{state.name}: {state.reason}" for state in fleet.replicas() if state.state is State.LOST]
    return "; ".join(found)


@contextmanager
def running_gateway(home: Home, artifact: Artifact) -> Iterator[str]:
    """A gateway for `artifact` on a free loopback port while in the block; yields its URL.

    Raises `ArtifactError` if it is no deployment and `ResourceError` if its server does not start.
    """
    with gateway(home, Fixed(home, artifact), Address(), say=lambda _: None) as running:
        running.wait_for_first_starts()
        yield running.url


def ask(base_url: str, model: str, prompt: str, max_tokens: int) -> str:
    """The greedy completion of `prompt` over REST; raises `ResourceError` if there is none."""
    request = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    try:
        response = httpx.post(f"{base_url}/v1/completions", json=request, timeout=ASK_SECONDS, trust_env=False)
    except httpx.TransportError as error:
        raise ResourceError(f"{base_url} cannot be reached: {error}.") from None
    if response.status_code != httpx.codes.OK:
        raise ResourceError(f"{base_url} answered {response.status_code}: {response.text[:500]}")
    text: str = response.json()["choices"][0]["text"]
    return text
