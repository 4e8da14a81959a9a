"""`moestro experts`: what each expert of a checkpoint specialised in."""

from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from moestro_flows.home import Home
from moestro_services.catalog import DIGITS, Catalog
from moestro_services.cli.output import Json, emit
from moestro_services.expertise import Expertise, read_expertise


def experts(
    checkpoint: Annotated[
        str,
        typer.Argument(help="An artifact's folder, a stage (its newest artifact) or the beginning of a fingerprint."),
    ],
    layer: Annotated[int | None, typer.Option("--layer", min=0, help="Only this layer.")] = None,
    json: Json = False,
) -> None:
    """Show what each expert specialised in: its origin, and the part of each domain's tokens that chose it."""
    catalog = Catalog(Home.current())
    entry = catalog.entry(checkpoint)
    expertise = read_expertise(catalog.profile_of(entry).path)
    if layer is not None:
        chosen = tuple(expert for expert in expertise.experts if expert.layer == layer)
        expertise = expertise.model_copy(update={"experts": chosen})
    name = {"stage": entry.record.stage, "fingerprint": entry.record.fingerprint}
    title = f"Experts of {entry.record.stage} {entry.record.fingerprint[:DIGITS]}"
    emit({"checkpoint": name} | expertise.model_dump(mode="json"), lambda: _table(title, expertise), json=json)


def _table(title: str, expertise: Expertise) -> Table:
    even = expertise.num_experts_per_tok / expertise.num_experts
    made = Table(
        title=title,
        title_justify="left",
        caption=f"Part of each domain's tokens that chose the expert; without any preference it is {even:.0%}.",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for name in ("layer", "expert"):
        made.add_column(name, justify="right")
    made.add_column("origin")
    for domain in expertise.domains:
        made.add_column(domain, justify="right")
    previous: int | None = None
    for expert in expertise.experts:
        if previous not in (None, expert.layer):
            made.add_section()
        first = expert.layer != previous
        previous = expert.layer
        cells = [_share(expert.shares[domain], best=domain == expert.preferred) for domain in expertise.domains]
        made.add_row(str(expert.layer) if first else "", str(expert.expert), expert.origin, *cells)
    return made


def _share(value: float, *, best: bool) -> str:
    return f"[bold]{value:.1%}[/bold]" if best else f"{value:.1%}"
