"""`moestro show models`: registered models, their versions, and who gets traffic."""

from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType
from rich.markup import escape

from moestro.registry import ModelRegistry, RegisteredModel
from moestro.registry.model_versions import CHALLENGER
from moestro_flows.home import Home
from moestro_services.catalog import DIGITS
from moestro_services.cli.output import emit, moment, table
from moestro_services.promotion import FORCED_TAG


def show_models(home: Home, *, json: bool) -> None:
    """Print the models of `home`; raises `ResourceError` if MLflow cannot be reached."""
    models = ModelRegistry(home.mlflow_uri, home.mlflow_files).models()
    emit({"models": [_model(model) for model in models]}, lambda: _models(home, models), json=json)


def _model(model: RegisteredModel) -> dict[str, Any]:
    versions = [
        {
            "version": version.version,
            "aliases": _aliases(model, version.version),
            "fingerprint": version.fingerprint,
            "created_at": version.created_at,
            "tags": dict(version.tags),
        }
        for version in model.versions
    ]
    return {
        "name": model.name,
        "aliases": dict(model.aliases),
        "canary_share": model.canary_share,
        "versions": versions,
    }


def _aliases(model: RegisteredModel, version: str) -> list[str]:
    return sorted(alias for alias, number in model.aliases.items() if number == version)


def _models(home: Home, models: Sequence[RegisteredModel]) -> RenderableType:
    if not models:
        return f"No models in {escape(str(home.path))}. `moestro run CONFIG.yaml` and `moestro deploy` register them."
    rows = []
    for model in models:
        for version in model.versions:
            names = _aliases(model, version.version)
            rows.append(
                [
                    f"{model.name}@{version.version}",
                    ", ".join(f"@{name}" for name in names) or "-",
                    f"{model.canary_share:.2%}" if model.canary_share and CHALLENGER in names else "",
                    f"deploy/{version.fingerprint[:DIGITS]}",
                    moment(version.created_at),
                    version.tags.get(FORCED_TAG, ""),
                ]
            )
    columns = ["=version", "=aliases", ">canary", "=artifact", "=registered", "forced because"]
    return table("Models", columns, rows)
