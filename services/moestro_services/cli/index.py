"""`moestro index rebuild`: the registry's database, made again from the records."""

import time

import typer

from moestro_flows.home import Home
from moestro_services.cli.output import Json, duration, emit

index_app = typer.Typer(help="About the registry's database, an index over the records.", no_args_is_help=True)


@index_app.callback()
def index() -> None:
    """About the registry's database, an index over the records."""


@index_app.command("rebuild")
def rebuild(json: Json = False) -> None:
    """Make the database again from the records of artifacts and runs alone."""
    from moestro.registry import connect

    home = Home.current()
    home.prepare()
    started = time.monotonic()
    registry = connect(home.database_url)
    try:
        counts = registry.rebuild(home.store, home.runs)
    finally:
        registry.close()
    seconds = time.monotonic() - started
    data = {"artifacts": counts.artifacts, "runs": counts.runs, "seconds": seconds}
    line = f"Indexed {counts.artifacts} artifacts and {counts.runs} runs in {duration(seconds)}."
    emit(data, lambda: line, json=json)
