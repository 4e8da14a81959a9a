"""`moestro report`: one self-contained HTML page about a run."""

from pathlib import Path
from typing import Annotated

import typer

from moestro.errors import ConfigError
from moestro_flows.home import Home
from moestro_services.catalog import Catalog
from moestro_services.cli.output import Json, emit, size


def report(
    run: Annotated[
        str, typer.Argument(help="A run's id (or its beginning), a lifecycle's name, or `latest`.")
    ] = "latest",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The file; default report-RUN.html.")] = None,
    json: Json = False,
) -> None:
    """Write one HTML page with a run's figures, plots, steps, config and lineage. It loads nothing from elsewhere."""
    from moestro_services.report import write_report

    catalog = Catalog(Home.current())
    found = catalog.run(run)
    target = out or Path(f"report-{found.id}.html")
    try:
        write_report(catalog, found, target)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written ({error.strerror}).") from None
    written = target.stat().st_size
    emit({"run": found.id, "file": str(target), "size": written}, lambda: f"{target} ({size(written)})", json=json)
