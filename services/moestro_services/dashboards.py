"""Gateway, MLflow and Prefect together on loopback ports, ended together.

A server that the environment names by an address (MLFLOW_TRACKING_URI, PREFECT_API_URL) is shown, not started.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from threading import Event

from moestro.errors import InputError, ResourceError
from moestro_flows.home import Home
from moestro_services.children import Child
from moestro_services.gateway.assembly import Policy
from moestro_services.gateway.launch import LOOPBACK, Address, gateway
from moestro_services.gateway.listening import listen
from moestro_services.gateway.sources import Registered, Source, chosen

Say = Callable[[str], None]


@dataclass(frozen=True)
class Ports:
    """A port each; 0 takes a free one."""

    gateway: int
    mlflow: int
    prefect: int


@dataclass
class Dashboards:
    """What runs: addresses by name, and the children to look after."""

    addresses: dict[str, str] = field(default_factory=dict)
    children: list[Child] = field(default_factory=list)

    def watch(self, *, check_seconds: float = 2.0) -> None:
        """Wait for ever; raises `ResourceError` naming the server that ended. Models' servers are started again."""
        while not Event().wait(check_seconds):
            for child in self.children:
                child.check()


@contextmanager
def dashboards(home: Home, ports: Ports, *, model: bool, policy: Policy, say: Say) -> Iterator[Dashboards]:
    """Everything running while in the block, with `model` what `moestro serve` would serve behind the gateway.

    Raises `BusyError` if a port is in use, before anything is started, and `ResourceError` if a server does not start.
    """
    running = Dashboards()
    addresses = running.addresses
    commands = {
        "MLflow": (_external_mlflow(home), ports.mlflow, _mlflow),
        "Prefect": ((home.prefect_url or "").removesuffix("/api"), ports.prefect, _prefect),
    }
    started = {name: (_free(port, name), start) for name, (external, port, start) in commands.items() if not external}
    _free(ports.gateway, "Gateway")
    with ExitStack() as stack:
        for name, (port, start) in started.items():
            say(f"Starting {name} ...")
            running.children.append(stack.enter_context(start(home, port)))
        for name, (external, _, _) in commands.items():
            addresses[name] = external or f"http://{LOOPBACK}:{started[name][0]}"
        for name, child in zip(started, running.children, strict=True):
            child.wait_until_it_answers(addresses[name] + ("/health" if name == "MLflow" else "/api/health"))
        source = _source(home, model=model)
        served = stack.enter_context(gateway(home, source, Address(port=ports.gateway), say=say, policy=policy))
        with suppress(ResourceError):  # has been said; it is started again
            served.wait_for_first_starts()
        addresses["Gateway"] = served.url
        yield running


def _source(home: Home, *, model: bool) -> Source:
    """What `moestro serve` would serve, or nothing."""
    try:
        return chosen(home, ()) if model else Registered(home, tuple)
    except InputError:
        return Registered(home, tuple)


def _external_mlflow(home: Home) -> str:
    return home.mlflow_uri if home.mlflow_uri.startswith(("http://", "https://")) else ""


def _free(port: int, name: str) -> int:
    """`port` itself, or a free one for 0; raises `BusyError` if it is in use."""
    with listen(LOOPBACK, port, option=f"--{name.lower()}-port") as probe:
        found: int = probe.getsockname()[1]
    return found


def _mlflow(home: Home, port: int) -> Child:
    """One worker and no job runner: two processes instead of fifteen."""
    options = {
        "--backend-store-uri": home.mlflow_uri,
        "--default-artifact-root": home.mlflow_files,
        "--host": LOOPBACK,
        "--port": str(port),
        "--workers": "1",
    }
    command = [sys.executable, "-m", "mlflow", "server", *(part for option in options.items() for part in option)]
    return Child("MLflow", command, home.environment() | os.environ, log=home.logs / "mlflow.log")


def _prefect(home: Home, port: int) -> Child:
    """The page asks the address it is told, so that must name the port as well."""
    settings = {
        "PREFECT_SERVER_API_HOST": LOOPBACK,
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_UI_API_URL": f"http://{LOOPBACK}:{port}/api",
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", LOOPBACK, "--port", str(port)]
    environment = home.environment() | os.environ | settings
    return Child("Prefect", command, environment, log=home.logs / "prefect.log")
