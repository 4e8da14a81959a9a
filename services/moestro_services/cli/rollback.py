"""`moestro rollback`: what was promoted last is taken back."""

from typing import Annotated

import typer
from rich.text import Text

from moestro.errors import InputError
from moestro_flows.home import Home
from moestro_services.cli.output import Json, emit
from moestro_services.cli.promote import actor, parse_model, promotions, state, told


def rollback(
    model: Annotated[str, typer.Argument(metavar="NAME", help="A model's name.")],
    reason: Annotated[str, typer.Option("--reason", help="Why, for the audit log.")] = "",
    json: Json = False,
) -> None:
    """End a model's canary; where there is none, @champion and @previous change places."""
    name, version = parse_model(model)
    if version:
        raise InputError(
            f"A rollback goes where @previous points, not to {model!r}.", hint=f"`moestro promote {model}` goes there."
        )
    done = promotions(Home.current()).rollback(name, reason=reason, actor=actor())
    emit(told(done), lambda: Text(f"{done.name}@{done.version} was rolled back.\n{state(done)}"), json=json)
