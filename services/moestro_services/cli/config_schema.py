"""`moestro config schema`: the JSON Schema of a lifecycle's YAML file, for editors."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from moestro.config import LifecycleConfig
from moestro_services.cli.output import Json

config_app = typer.Typer(help="About config files.", no_args_is_help=True)


@config_app.callback()
def config() -> None:
    """About config files."""


@config_app.command("schema")
def schema(
    out: Annotated[Path | None, typer.Option("--out", help="Write to this file instead of standard output.")] = None,
    _json: Json = False,
) -> None:
    """Print the JSON Schema of a lifecycle config, with every field's description."""
    made = {"$schema": "https://json-schema.org/draft/2020-12/schema", **LifecycleConfig.model_json_schema()}
    text = json.dumps(made, indent=2) + "\n"
    if out is None:
        sys.stdout.write(text)
    else:
        out.write_text(text)
        if _json:
            sys.stdout.write(json.dumps({"schema": str(out)}) + "\n")
