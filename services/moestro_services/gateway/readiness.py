"""What /health, /ready and /v1/models answer."""

from typing import Literal

from moestro.config import Config
from moestro_services.gateway.deployments import Deployment
from moestro_services.gateway.errors import UnknownModelError
from moestro_services.gateway.fleet import Fleet
from moestro_services.gateway.routes import Route, resolve
from moestro_services.gateway.schemas import ModelCard


class VersionState(Config):
    """How the server of one version of a model stands."""

    model: str
    """The model's name."""
    version: str
    """The version's number."""
    aliases: tuple[str, ...]
    """Aliases that lead to it now."""
    state: Literal["starting", "serving", "draining", "lost"]
    """`lost`: it ended or cannot be started, and is started again after a while."""
    in_flight: int
    """Requests it is answering."""
    restarts: int
    """How often it was started again."""


class Readiness(Config):
    """Which models answer."""

    ready: bool
    """Whether all do, and it is known which there are."""
    models: dict[str, bool]
    """Whether each model's champion answers."""
    versions: tuple[VersionState, ...] = ()
    """The servers."""


def readiness(fleet: Fleet) -> Readiness:
    """How `fleet` stands. Not why: everybody may ask, and reasons name files. /api/models tells them."""
    models = fleet.ready
    versions = tuple(
        VersionState(
            model=replica.name,
            version=replica.version,
            aliases=replica.aliases,
            state=replica.state.value,
            in_flight=replica.in_flight,
            restarts=replica.restarts,
        )
        for replica in fleet.replicas()
    )
    return Readiness(ready=fleet.all_answer, models=models, versions=versions)


def cards(fleet: Fleet) -> tuple[ModelCard, ...]:
    """All names that may be asked for: of each model the bare one, its aliases and its versions.

    Raises `UnavailableError` while nothing is known of any.
    """
    fleet.check_known()
    return tuple(card for route in fleet.table.values() for card in _cards(route))


def card(fleet: Fleet, model: str) -> ModelCard:
    """What is served as `model`; raises `UnknownModelError`."""
    found = next((found for found in cards(fleet) if found.id == model), None)
    if found is None:
        resolve(fleet.table, model, "")  # knows in which words to refuse
        raise UnknownModelError(f"The model {model!r} does not exist.")
    return found


def _cards(route: Route) -> list[ModelCard]:
    names = {route.name: route.champion}
    names |= {
        f"{route.name}@{suffix}": replica for suffix, replica in (*route.aliases.items(), *route.versions.items())
    }
    found = {name: replica.deployment for name, replica in names.items() if replica is not None}
    return [_card(name, deployment) for name, deployment in found.items() if deployment is not None]


def _card(name: str, deployment: Deployment) -> ModelCard:
    return ModelCard(
        id=name,
        created=deployment.created,
        root=f"{deployment.checkpoint.stage}/{deployment.checkpoint.fingerprint}",
        max_model_len=deployment.max_model_len,
    )
