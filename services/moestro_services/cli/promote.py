"""`moestro promote`: a version of a model gets traffic, all of it or a share."""

import getpass
import os
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from moestro.errors import InputError
from moestro_flows.home import Home
from moestro_services.cli.output import Json, emit

if TYPE_CHECKING:
    from moestro_services.promotion import Promotion, Promotions

Force = Annotated[
    str, typer.Option("--force", metavar="REASON", help="Do it although gates refuse; the reason is recorded.")
]


def promote(
    model: Annotated[
        str,
        typer.Argument(
            metavar="NAME[@VERSION]", help="A model, with a version's number or alias; default @challenger."
        ),
    ],
    share: Annotated[
        float | None,
        typer.Option("--share", help="Only this share of the requests, between 0 and 1: a canary beside the champion."),
    ] = None,
    force: Force = "",
    json: Json = False,
) -> None:
    """Give a version of a model the traffic. Gateways follow; versions that are worse than the champion are refused."""
    name, version = parse_model(model)
    done = promotions(Home.current()).promote(name, version or "challenger", share=share, force=force, actor=actor())
    emit(told(done), lambda: Text(_words(done)), json=json)


def parse_model(text: str) -> tuple[str, str]:
    """`NAME@VERSION` taken apart; the version is empty where there is none. Raises `InputError` for half of it."""
    name, at, version = text.partition("@")
    if not name or bool(at) != bool(version):
        raise InputError(f"{text!r} is no model: expected NAME or NAME@VERSION.", hint="`moestro show models`.")
    return name, version


def promotions(home: Home) -> "Promotions":
    """The decisions on the models of `home`, written to its audit log."""
    from moestro_services.audit import Audit
    from moestro_services.promotion import Promotions

    home.prepare()
    return Promotions(home, Audit.of(home))


def actor() -> str:
    """Who types this, for the audit log."""
    try:
        return f"cli:{getpass.getuser()}"
    except (KeyError, OSError):  # a container may run as a user that it does not know
        return f"cli:{os.getuid()}"


def told(done: "Promotion") -> dict[str, Any]:
    """A promotion as JSON values."""
    return {
        "name": done.name,
        "version": done.version,
        "aliases": dict(done.aliases),
        "canary_share": done.canary_share,
        "forced": done.forced,
        "refused": list(done.refused),
        "changed": done.changed,
    }


def state(done: "Promotion") -> str:
    """The model's aliases in one line."""
    share = f" (gets {done.canary_share:.2%} of the requests)" if done.canary_share else ""
    names = [
        f"@{alias} {number}{share if alias == 'challenger' else ''}" for alias, number in sorted(done.aliases.items())
    ]
    return f"{done.name}: {', '.join(names) or 'no aliases'}"


def _words(done: "Promotion") -> str:
    label = f"{done.name}@{done.version}"
    what = "is the champion" if done.aliases.get("champion") == done.version else "is a canary"
    if not done.changed:
        return f"{label} {what} already; nothing was changed.\n{state(done)}"
    overridden = "".join(f"\noverridden: {refusal}" for refusal in done.refused)
    return f"{label} {what} now.{overridden}\n{state(done)}"
