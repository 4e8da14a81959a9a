"""Where a gateway's models come from: all that the registry holds, or one deployment's artifact."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from moestro.artifacts import Artifact
from moestro.errors import ArtifactError, InputError, ResourceError
from moestro.inference.server import ServerConfig, VllmServer
from moestro.registry import ModelRegistry
from moestro.registry.model_versions import CHAMPION, ModelVersion, RegisteredModel
from moestro_flows.home import Home
from moestro_services.catalog import Catalog
from moestro_services.gateway.deployments import Deployment, ModelServer
from moestro_services.gateway.steering import Steering
from moestro_services.served import describe

UNREGISTERED = "0"
"""The version of a deployment that is served without having been registered."""


@dataclass(frozen=True)
class ServerSettings:
    """How every model server is started."""

    kv_cache_gib: float = 0.5
    """Memory of each server's KV cache in GiB."""
    threads: int | None = None
    """Threads of each server; None leaves them to torch."""


class Source(Protocol):
    """Says what is to be served, and opens it."""

    steering: Steering
    """The profiles that the opened servers know."""

    def read(self) -> Sequence[RegisteredModel]:
        """The models as they are to be served now."""

    def open(self, version: ModelVersion) -> tuple[Deployment, ModelServer]:
        """What a version consists of, its server not started; raises `ArtifactError` if it is not there."""


class Registered:
    """What the model registry says, of some models or of all."""

    def __init__(
        self,
        home: Home,
        models: Callable[[], Sequence[RegisteredModel]],
        *,
        names: Collection[str] = (),
        settings: ServerSettings | None = None,
    ) -> None:
        """`models` reads the registry; `names` are the models to serve, none means all."""
        self._home = home
        self._models = models
        self._names = frozenset(names)
        self._settings = settings or ServerSettings()
        self.steering = Steering(home.store)

    def read(self) -> Sequence[RegisteredModel]:
        """The models; raises what reading the registry raises."""
        return [model for model in self._models() if not self._names or model.name in self._names]

    def open(self, version: ModelVersion) -> tuple[Deployment, ModelServer]:
        """Deployment and server of a version, its files verified."""
        artifact = self._home.store.find(version.stage, version.fingerprint)
        if artifact is None:
            raise ArtifactError(
                f"{version.stage} {version.fingerprint[:16]}, which is {version.name}@{version.version}, "
                f"is not in {self._home.path}."
            )
        return open_version(self._home, artifact, version, self._settings, self.steering)


class Fixed:
    """One deployment's artifact, registered or not."""

    def __init__(self, home: Home, artifact: Artifact, settings: ServerSettings | None = None) -> None:
        """Raises `ArtifactError` if `artifact` is no deployment."""
        self.name = describe(artifact).name
        """The model's name."""
        self._home = home
        self._artifact = artifact
        self._settings = settings or ServerSettings()
        self.steering = Steering(home.store)
        version = ModelVersion(
            name=self.name,
            version=UNREGISTERED,
            stage=artifact.stage,
            fingerprint=artifact.fingerprint,
            created_at=artifact.record.created_at,
            tags={},
        )
        self._model = RegisteredModel(self.name, (version,), {CHAMPION: UNREGISTERED}, 0.0)

    def read(self) -> Sequence[RegisteredModel]:
        """Always the one."""
        return [self._model]

    def open(self, version: ModelVersion) -> tuple[Deployment, ModelServer]:
        """Its deployment and server."""
        return open_version(self._home, self._artifact, version, self._settings, self.steering)


def chosen(home: Home, references: Sequence[str], settings: ServerSettings | None = None) -> Source:
    """What is to be served: the registered models of these names, all of them if there are no names, or the one
    deployment that a folder or the beginning of a fingerprint means; the newest where nothing is registered.

    If MLflow cannot be reached, what is no artifact of this home is taken for registered models, which are served as
    soon as it answers. Raises `ArtifactError` or `InputError` if there is no such thing.
    """
    registry = ModelRegistry(home.mlflow_uri, home.mlflow_files)
    try:
        names = {model.name for model in registry.models()}
    except ResourceError:
        found = _artifact(home, references)
        if found is not None:
            return Fixed(home, found, settings)
        return Registered(home, registry.models, names=references, settings=settings)
    if names and names.issuperset(references):
        return Registered(home, registry.models, names=references, settings=settings)
    if len(references) > 1:
        unknown = ", ".join(sorted({*references} - names))
        raise InputError(f"Not registered: {unknown}.", hint=f"There are {', '.join(sorted(names)) or 'no models'}.")
    if references:
        return Fixed(home, Catalog(home).entry(references[0]).artifact, settings)
    try:
        return Fixed(home, Catalog(home).entry("deploy").artifact, settings)
    except ArtifactError:
        raise InputError(
            f"Nothing is deployed in {home.path}.",
            hint="`moestro run` of a lifecycle that ends in deploy, or `moestro deploy`, comes first.",
        ) from None


def _artifact(home: Home, references: Sequence[str]) -> Artifact | None:
    """The artifact that the one reference means, if it means one."""
    try:
        return Catalog(home).entry(references[0]).artifact if len(references) == 1 else None
    except ArtifactError:
        return None


def open_version(
    home: Home, artifact: Artifact, version: ModelVersion, settings: ServerSettings, steering: Steering
) -> tuple[Deployment, VllmServer]:
    """The deployment that `artifact` describes, as a version of a model, and its server, not started yet.

    Raises `ArtifactError` if it is no deployment, or if its checkpoint is missing or not what was published.
    """
    served = describe(artifact)
    checkpoint = home.store.find(served.checkpoint.stage, served.checkpoint.fingerprint)
    if checkpoint is None:
        missing = f"{served.checkpoint.stage} {served.checkpoint.fingerprint[:16]}"
        raise ArtifactError(
            f"The checkpoint {missing} of deployment {served.name!r} is not in {home.path}.",
            hint="`moestro run` makes it again.",
        )
    deployment = Deployment(
        name=version.name,
        version=version.version,
        fingerprint=artifact.fingerprint,
        checkpoint=served.checkpoint,
        dtype=served.dtype,
        max_model_len=served.max_model_len,
        created=int(artifact.record.created_at.timestamp()),
    )
    arguments, environment = steering.server_arguments(deployment)
    config = ServerConfig(
        name=version.name,
        dtype=served.dtype,
        max_model_len=served.max_model_len,
        kv_cache_gib=settings.kv_cache_gib,
        threads=settings.threads,
        tool_call_parser=served.tool_call_parser,
        fingerprint=deployment.label,
        extra_arguments=tuple(arguments),
        extra_environment=environment,
    )
    log = home.logs / f"vllm-{artifact.fingerprint[:16]}-{version.version}.log"
    return deployment, VllmServer(checkpoint.path, config, log=log)
