"""`moestro serve`: the gateway before deployed models, until Ctrl-C."""

import json as json_format
import sys
from functools import partial
from threading import Event
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from moestro.errors import ConfigError
from moestro_flows.home import Home
from moestro_services.cli.output import Json
from moestro_services.cli.stopping import until_stopped

if TYPE_CHECKING:
    from moestro_services.gateway.keys import KeyRing

MODELS = (
    "Registered models to serve, default all; or one deployment by its folder or the beginning of its fingerprint. "
    "Where nothing is registered, the newest deployment."
)
Models = Annotated[list[str] | None, typer.Argument(help=MODELS, show_default=False)]
Host = Annotated[str, typer.Option("--host", help="Address to bind; beyond loopback there must be a key.")]
Port = Annotated[int, typer.Option("--port", help="Port; 0 takes a free one.", min=0, max=65535)]
NoAuth = Annotated[bool, typer.Option("--no-auth", help="Ask for no keys; for loopback alone.")]
CacheSize = Annotated[
    float, typer.Option("--kv-cache-gib", help="Memory of each model server's KV cache in GiB.", min=0.01)
]
ExpertShare = Annotated[float, typer.Option(help="Share of the requests that tell how experts are used.", min=0, max=1)]
Rollback = Annotated[
    bool, typer.Option(help="Take a canary or a new champion back that does worse than the other version.")
]
Requests = Annotated[int, typer.Option(help="Requests before a version is judged.", min=1)]
Errors = Annotated[float, typer.Option(help="Largest excess of its share of failed requests.", min=0, max=1)]
Latency = Annotated[float, typer.Option(help="Largest ratio of its median time to the first byte.", min=1)]
Minutes = Annotated[float, typer.Option(help="How long a new champion is judged.", min=0)]


def serve(  # noqa: PLR0917
    models: Models = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    no_auth: NoAuth = False,
    kv_cache_gib: CacheSize = 0.5,
    expert_share: ExpertShare = 0.05,
    rollback: Rollback = True,
    rollback_requests: Requests = 50,
    rollback_errors: Errors = 0.05,
    rollback_latency: Latency = 2.0,
    rollback_minutes: Minutes = 10.0,
    json: Json = False,
) -> None:
    """Serve models over an OpenAI-compatible REST API until Ctrl-C. Traffic follows the model registry's aliases."""
    from moestro_services.gateway.assembly import Policy
    from moestro_services.gateway.expert_metrics_sampling import Sampling
    from moestro_services.gateway.launch import Address, gateway
    from moestro_services.gateway.sources import Fixed, ServerSettings, chosen
    from moestro_services.gateway.watch import RollbackRule

    home = Home.current()
    home.prepare()
    keys = asked_keys(home, no_auth=no_auth)
    source = chosen(home, models or (), ServerSettings(kv_cache_gib=kv_cache_gib))
    rule = RollbackRule(
        min_requests=rollback_requests,
        max_error_excess=rollback_errors,
        max_latency_ratio=rollback_latency,
        champion_minutes=rollback_minutes,
    )
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    progress = Progress(*columns, console=console, transient=True)
    say = partial(console.print, highlight=False, markup=False)
    policy = Policy(keys=keys, rule=rule if rollback else None, sampling=Sampling(share=expert_share))
    opened = gateway(home, source, Address(host, port), say=say, policy=policy)
    with until_stopped(console), progress, opened as running:
        progress.add_task("vLLM is starting")
        if isinstance(source, Fixed):
            running.wait_for_first_starts()  # a mistake to be told, not a server lost among others
        running.wait_until_ready()
        progress.stop()
        _announce(running.url, sorted(running.fleet.ready), json=json)
        Event().wait()


def asked_keys(home: Home, *, no_auth: bool) -> "KeyRing | None":
    """The keys of which requests must bear one; raises `ConfigError` if there are none yet."""
    from moestro_services.gateway.keys import KeyRing

    if no_auth:
        return None
    keys = KeyRing.of(home)
    if not any(key.live for key in keys.list()):
        raise ConfigError(
            "There is no API key, so nobody could ask.",
            hint="Make one with `moestro keys create NAME`, or serve this machine alone with --no-auth.",
        )
    return keys


def _announce(url: str, models: list[str], *, json: bool) -> None:
    if json:
        sys.stdout.write(json_format.dumps({"url": url, "models": models, "ready": True}) + "\n")
        sys.stdout.flush()
    else:
        served = ", ".join(models) or "Nothing yet"
        Console().print(f"{served} at {url}/v1 (Ctrl-C stops it)", highlight=False, markup=False)
