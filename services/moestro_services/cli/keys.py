"""`moestro keys`: the API keys that the gateway knows. A running gateway heeds changes at once."""

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console

from moestro_flows.home import Home
from moestro_services.audit import Audit
from moestro_services.cli.output import Json, emit, moment, table
from moestro_services.cli.promote import actor
from moestro_services.gateway.caller import Scope
from moestro_services.gateway.keys import Key, KeyRing
from moestro_services.gateway.limits import Limits

keys_app = typer.Typer(help="API keys of the gateway.", no_args_is_help=True)


def _limit(option: str, about: str) -> Any:
    return typer.Option(option, help=f"{about}; 0: no limit. Default: the gateway's.", min=0)


@keys_app.callback()
def keys() -> None:
    """API keys of the gateway."""


@keys_app.command("create")
def create(
    name: Annotated[str, typer.Argument(help="What to call it: who or what will use it.")],
    scope: Annotated[
        list[Scope] | None,
        typer.Option(
            "--scope", help="What it allows, several times if wanted; admin implies the others. Default: infer."
        ),
    ] = None,
    requests_per_minute: Annotated[int | None, _limit("--requests-per-minute", "Requests a minute")] = None,
    tokens_per_minute: Annotated[int | None, _limit("--tokens-per-minute", "Prompts' and answers' tokens")] = None,
    concurrent_requests: Annotated[int | None, _limit("--concurrent-requests", "Requests at a time")] = None,
    max_body_bytes: Annotated[int | None, _limit("--max-body-bytes", "Size of a request's body")] = None,
    request_seconds: Annotated[float | None, _limit("--request-seconds", "Time until a model's last byte")] = None,
    json: Json = False,
) -> None:
    """Make a key and print it. It is kept nowhere: this is the only time that it is shown."""
    given = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "concurrent_requests": concurrent_requests,
        "max_body_bytes": max_body_bytes,
        "request_seconds": request_seconds,
    }
    limits = Limits.model_validate({field: value or None for field, value in given.items() if value is not None})
    home = Home.current()
    key, secret = KeyRing.of(home).create(name, scope or [Scope.INFER], limits)
    facts = key.facts()
    Audit.of(home).write(actor(), "keys.create", key.id, name=key.name, scopes=facts["scopes"], limits=facts["limits"])
    emit({"key": secret, **facts}, lambda: secret, json=json)
    if not json:  # standard output is the key alone, so that a script can take it
        Console(stderr=True).print("Keep it: it is not shown again.", _table([key]))


@keys_app.command("list")
def list_keys(json: Json = False) -> None:
    """List all keys, revoked ones too. What they open is kept as digests alone, and not shown."""
    found = KeyRing.of(Home.current()).list()
    none = "No keys. `moestro keys create NAME` makes one."
    emit({"keys": [key.facts() for key in found]}, lambda: _table(found) if found else none, json=json)


@keys_app.command("revoke")
def revoke(
    key: Annotated[str, typer.Argument(help="The key's id or name.")],
    json: Json = False,
) -> None:
    """Revoke a key: requests with it are refused from now on. There is no way back."""
    home = Home.current()
    revoked = KeyRing.of(home).revoke(key)
    Audit.of(home).write(actor(), "keys.revoke", revoked.id, name=revoked.name)
    emit(revoked.facts(), lambda: f"{revoked.name} ({revoked.id}) is revoked.", json=json)


def _table(found: Sequence[Key]) -> Any:
    rows = [
        [
            key.id,
            key.name,
            ", ".join(key.facts()["scopes"]),
            ", ".join(f"{name} {'none' if value is None else value}" for name, value in key.limits.given().items()),
            moment(key.created_at),
            moment(key.revoked_at) if key.revoked_at else "",
        ]
        for key in found
    ]
    return table("API keys", ["=id", "name", "=scopes", "own limits", "=created", "=revoked"], rows)
