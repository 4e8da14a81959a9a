"""`moestro steer`: a steering profile for a checkpoint of the home, published there for the gateway to serve."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from moestro.artifacts import Artifact
from moestro.config import read_yaml, validate
from moestro.errors import ArtifactError, ConfigError
from moestro_flows.home import Home
from moestro_services.catalog import Catalog
from moestro_services.cli.output import Json, emit
from moestro_services.cli.stage import run_in


def steer(
    model: Annotated[
        str,
        typer.Argument(
            help="What is steered: an artifact's folder, a stage (its newest artifact) or the beginning of a "
            "fingerprint; of a deployment its checkpoint."
        ),
    ],
    config: Annotated[Path, typer.Option("--config", help="YAML file with the profile: name, method and the rest.")],
    tokens: Annotated[
        list[str] | None,
        typer.Option(
            "--tokens", help="DOMAIN=ARTIFACT; repeat for each. A deployment brings those that it was gated with."
        ),
    ] = None,
    cpus: Annotated[int | None, typer.Option("--cpus", help="Cores to use.", min=1)] = None,
    json: Json = False,
) -> None:
    """Make a steering profile, gated by the held-out loss that it costs. Servers know it from their next start on."""
    from moestro.stages import STAGES

    home = Home.current()
    profile = validate(STAGES["steer"].config, read_yaml(config), where=str(config))
    inputs = _inputs(Catalog(home), model, tokens or [])
    record = (artifact := run_in(home.store, "steer", profile, inputs, cpus=cpus)).record
    data = {"path": str(artifact.path), "fingerprint": record.fingerprint, "result": record.result}
    emit(data, lambda: Text(_told(record.result, record.fingerprint)), json=json)


def _told(result: dict[str, Any], fingerprint: str) -> str:
    named = sum(len(experts) for experts in result["experts"].values())
    what = f" on {named} experts" if named else ""
    lines = [f"{result['name']}  {result['method']}{what}, {fingerprint[:16]}"]
    return "\n".join(
        lines + [f"  {domain}: {increase:+.4f} nats per token" for domain, increase in result["loss_increase"].items()]
    )


def _inputs(catalog: Catalog, model: str, tokens: list[str]) -> dict[str, Any]:
    """The stage's inputs; raises `ArtifactError` and `InputError` for what is not there."""
    given = _artifact(catalog, model)
    domains: dict[str, Artifact] = {}
    for item in tokens:
        domain, _, reference = item.partition("=")
        if not domain or not reference:
            raise ConfigError(f"--tokens {item}: expected DOMAIN=ARTIFACT.")
        domains[domain] = _artifact(catalog, reference)
    if given.stage != "deploy":
        return {"model": given, "tokens": domains}
    inputs = given.record.inputs
    found = {role: _made(catalog, item.stage, item.fingerprint) for role, item in inputs.items()}
    brought = {role.partition("/")[2]: item for role, item in found.items() if role.startswith("tokens/")}
    return {"model": found["model"], "tokens": domains or brought}


def _artifact(catalog: Catalog, reference: str) -> Artifact:
    return Artifact.open(catalog.entry(reference).path)


def _made(catalog: Catalog, stage: str, fingerprint: str) -> Artifact:
    found = catalog.home.store.find(stage, fingerprint)
    if found is None:
        raise ArtifactError(
            f"{stage} {fingerprint[:16]} is not in {catalog.home.path}.", hint="`moestro run` makes it."
        )
    return found
