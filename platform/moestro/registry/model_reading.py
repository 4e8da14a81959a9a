"""Reading MLflow's model registry: two queries, and nothing else, however many models there are."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from moestro.registry.model_creation import FINGERPRINT_TAG, STAGE_TAG
from moestro.registry.model_versions import CHALLENGER, ModelVersion, RegisteredModel
from moestro.registry.model_writes import share_of
from moestro.registry.tracked_run import client

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion as MlflowVersion
    from mlflow.store.entities import PagedList

DEPLOYED = "deploy"
"""The stage whose artifacts are versions."""
SHARE_TAG = "moestro.canary_share"
PAGE = 1000

Found = tuple[RegisteredModel, str]
"""A model, and its share tag as it stands there."""


def read_models(uri: str) -> list[Found]:
    """The models that have a deployment among their versions, by name. Raises MLflow's own errors."""
    found, complete = _read(uri)
    if not complete:  # a version was deleted between the two queries, or an alias means none of ours
        found, _ = _read(uri)
    return found


def _read(uri: str) -> tuple[list[Found], bool]:
    """The models, and whether every alias names a version of theirs. Versions are read last: they seldom go."""
    mlflow = client(uri)
    registered = _all(lambda token: mlflow.search_registered_models(max_results=PAGE, page_token=token))
    query, order = f"tags.`{STAGE_TAG}` = '{DEPLOYED}'", ["name ASC", "version_number DESC"]
    versions: dict[str, list[ModelVersion]] = {}
    for item in _all(lambda token: mlflow.search_model_versions(query, PAGE, order, token)):
        versions.setdefault(item.name, []).append(_version(item))
    found, complete = [], True
    for item in registered:
        own = versions.get(item.name)
        if own is None:
            continue
        numbers = {version.version for version in own}
        named = {alias: str(number) for alias, number in item.aliases.items()}
        aliases = {alias: number for alias, number in named.items() if number in numbers}
        complete = complete and len(aliases) == len(named)
        tag = item.tags.get(SHARE_TAG, "")
        found.append((RegisteredModel(item.name, tuple(own), aliases, share_of(tag, aliases.get(CHALLENGER))), tag))
    return found, complete


def _all(fetch: "Callable[[str | None], PagedList[Any]]") -> list[Any]:
    """What every page holds that `fetch` returns for a token."""
    page = fetch(None)
    found = list(page)
    while page.token:
        page = fetch(page.token)
        found += page
    return found


def _version(item: "MlflowVersion") -> ModelVersion:
    tags = dict(item.tags)
    return ModelVersion(
        name=item.name,
        version=str(item.version),
        stage=tags[STAGE_TAG],
        fingerprint=tags.get(FINGERPRINT_TAG, ""),
        created_at=datetime.fromtimestamp(item.creation_timestamp / 1000, UTC),
        tags=tags,
    )
