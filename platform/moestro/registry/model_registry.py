"""`ModelRegistry`: the models registered in MLflow. Their aliases alone say which version gets traffic.

A version stands for a deployment: an artifact of the `deploy` stage, named by its fingerprint in a tag. What MLflow
holds besides (other teams' models on a shared server, versions that stand for something else) is not seen.

    @champion    answers requests for the bare name
    @challenger  is to follow it; answers a share of those requests while the tag `moestro.canary_share` says so
    @previous    was the champion before: where a rollback goes

That tag reads `VERSION:SHARE` and holds only while @challenger points to that very version. So no moment, and no
reader who sees tag and alias of different moments, gives traffic to a version that nobody promoted.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import ColumnClause, column, inspect, select, table

from moestro.artifacts import Artifact, exclusive
from moestro.errors import BusyError, InputError, ResourceError
from moestro.registry.database import open_engine, parse_url, reading
from moestro.registry.model_changes import ChangeCounter, Stamp
from moestro.registry.model_creation import create_version, require_name
from moestro.registry.model_reading import DEPLOYED, SHARE_TAG, Found, read_models
from moestro.registry.model_versions import CHALLENGER, CHAMPION, ModelVersion, RegisteredModel
from moestro.registry.model_writes import ordered, share_tag
from moestro.registry.tracked_run import MAX_TAG, client
from moestro.registry.tracking import is_server, local_folder, reach, shown

INTRODUCED_TAG = "moestro.introduced"
BAD_PARAMETER = "INVALID_PARAMETER_VALUE"


class ModelChangedError(BusyError):
    """A model's aliases are no longer what a decision was made on; nothing was changed."""


class ModelRegistry:
    """The models at `uri`, as one home uses them. `files_root` (`file:///…`) is the home's folder of MLflow files.

    Reading may be done every second: it costs two queries, from a SQLite file only after somebody wrote to it, and
    creates nothing: where there is no MLflow database there are no models. All methods raise `ResourceError` if MLflow
    cannot be reached.
    """

    def __init__(self, uri: str, files_root: str, *, experiment: str = "moestro") -> None:
        self.uri = uri
        self.files = local_folder(files_root)
        self.experiment = experiment
        self._prepared = False
        self._changes = _counter(uri)
        self._last: tuple[Stamp, list[Found]] | None = None

    def models(self) -> tuple[RegisteredModel, ...]:
        """All models with their versions, by name."""
        return tuple(model for model, _ in self._read())

    def model(self, name: str) -> RegisteredModel:
        """The model `name`; raises `InputError` naming those there are."""
        return self._find(name)[0]

    def register(self, name: str, artifact: Artifact, run_id: str = "") -> ModelVersion:
        """The version of `name` that stands for `artifact`, a deployment; made if there is none. No alias moves.

        `run_id` is the MLflow run that it came from. Raises `InputError` if it is no deployment, and for a name that
        MLflow does not accept.
        """
        with self._writing():
            return self._register(name, artifact, run_id)

    def introduce(self, name: str, artifact: Artifact, run_id: str = "") -> ModelVersion:
        """Like `register`; a new version becomes @champion where there is none, and otherwise @challenger.

        Only once: one that was introduced before moves no alias, so what was rolled back does not come back. Nor does
        @challenger move away from a version that is a canary now. Raises what `register` raises.
        """
        with self._writing():
            version = self._register(name, artifact, run_id)
            if INTRODUCED_TAG in version.tags:
                return version
            model, raw = self._find(name)
            alias = _place(model, version.version)
            if alias:
                self._change(model, raw, {alias: version.version}, None, {})
            # Last: killed before this, it is introduced again, which then has nothing or the rest left to do.
            client(self.uri).set_model_version_tag(name, version.version, INTRODUCED_TAG, alias or "version")
            return _version(self._find(name)[0], version.version)

    def change(
        self,
        name: str,
        *,
        aliases: Mapping[str, str | None],
        canary_share: float | None = None,
        tags: Mapping[str, Mapping[str, str]] | None = None,
        seen: RegisteredModel | None = None,
    ) -> RegisteredModel:
        """Point `aliases` to versions (None deletes one) and return the model as it is then.

        `canary_share` is the share of requests that the version which is @challenger afterwards gets; None leaves it
        as it is, and ends it where @challenger moves. `tags` are for versions, by number. A process that dies on the
        way leaves one of the states that `model_writes.ordered` describes, each of which can be served.

        Raises `ModelChangedError` if aliases or share are not those of `seen`, `InputError` for unknown versions.
        """
        with self._writing():
            model, raw = self._find(name)
            if seen and (model.aliases, model.canary_share) != (seen.aliases, seen.canary_share):
                raise ModelChangedError(
                    f"Somebody else changed {name} meanwhile.", hint="`moestro show models` says what it is now."
                )
            self._change(model, raw, aliases, canary_share, tags or {})
            return self._find(name)[0]

    def delete(self, name: str, version: str) -> None:
        """Delete a version; its number is not used again, its artifact stays.

        Raises `BusyError` while an alias points to it, `InputError` if there is none.
        """
        with self._writing():
            model = self._find(name)[0]
            _version(model, version)
            held = sorted(alias for alias, number in model.aliases.items() if number == version)
            if held:
                raise BusyError(
                    f"{name}@{version} is {' and '.join(f'@{alias}' for alias in held)} and cannot be deleted.",
                    hint="Promote another version, or roll back, first.",
                )
            client(self.uri).delete_model_version(name, version)

    def _register(self, name: str, artifact: Artifact, run_id: str) -> ModelVersion:
        if artifact.stage != DEPLOYED:
            raise InputError(
                f"{artifact.stage} {artifact.fingerprint[:16]} is no deployment, so it cannot be a version of {name}.",
                hint="`moestro deploy CHECKPOINT` makes one of a checkpoint.",
            )
        require_name(name)
        known = [version for model in self.models() if model.name == name for version in model.versions]
        if found := next((version for version in known if version.fingerprint == artifact.fingerprint), None):
            return found
        number = create_version(self.uri, self.experiment, name, artifact, run_id)
        return _version(self._find(name)[0], number)

    def _change(
        self,
        model: RegisteredModel,
        raw: str,
        aliases: Mapping[str, str | None],
        canary_share: float | None,
        tags: Mapping[str, Mapping[str, str]],
    ) -> None:
        for number in (*tags, *filter(None, aliases.values())):
            _version(model, number)
        mlflow = client(self.uri)
        for number, values in tags.items():
            for key, value in values.items():
                mlflow.set_model_version_tag(model.name, number, key, value[:MAX_TAG])
        challenger = aliases.get(CHALLENGER, model.aliases.get(CHALLENGER))
        moved = challenger != model.aliases.get(CHALLENGER)
        left = 0.0 if moved else model.canary_share
        wanted = share_tag(challenger, left if canary_share is None else canary_share)
        if wanted != raw:
            mlflow.set_registered_model_tag(model.name, SHARE_TAG, wanted)
        for alias, target in ordered(model.aliases, aliases):
            if target is None:
                mlflow.delete_registered_model_alias(model.name, alias)
            else:
                mlflow.set_registered_model_alias(model.name, alias, target)

    def _find(self, name: str) -> Found:
        """The model, and its share tag as it stands there."""
        found = self._read()
        for model, raw in found:
            if model.name == name:
                return model, raw
        names = ", ".join(model.name for model, _ in found)
        raise InputError(
            f"No model {name!r} is registered.",
            hint=f"There are {names}." if names else "A lifecycle that ends in deploy registers one.",
        )

    def _read(self) -> list[Found]:
        """The models; those read last if nobody wrote to the database since."""
        stamp = self._changes.now() if self._changes else None
        last = self._last
        if stamp is not None and last and last[0] == stamp:
            return last[1]
        if not self._is_prepared():
            return []
        with self._reachable():
            found = read_models(self.uri)
        self._last = (stamp, found) if stamp else None
        return found

    def _is_prepared(self) -> bool:
        """Whether `Tracker.prepare` was here. MLflow's own client would set up a database where it finds none."""
        if is_server(self.uri):
            return True
        url = parse_url(self.uri)
        if url.get_backend_name() == "sqlite" and not Path(str(url.database)).exists():
            return False
        if self._prepared:
            return True
        engine = open_engine(self.uri)
        name: ColumnClause[str] = column("name")
        with reading(engine) as connection:
            there = inspect(connection).has_table("experiments")
            wanted = select(name).select_from(table("experiments", name)).where(name == self.experiment)
            self._prepared = there and connection.execute(wanted).first() is not None
        engine.dispose()
        return self._prepared

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the home's right to change models. Reading and writing under it is one step for all its processes."""
        with exclusive(self.files / "models.lock", what=str(self.files), wait=True), self._reachable():
            yield

    @contextmanager
    def _reachable(self) -> Iterator[None]:
        """Turn MLflow's errors into readable ones, at once where it would retry for minutes."""
        from mlflow.exceptions import MlflowException

        if is_server(self.uri):
            reach(self.uri)
        try:
            yield
        except MlflowException as error:
            if error.error_code == BAD_PARAMETER:
                raise InputError(str(error)) from error
            raise ResourceError(f"MLflow at {shown(self.uri)} cannot be used: {error}.") from error


def _counter(uri: str) -> ChangeCounter | None:
    """What tells whether anything changed; None where only a query can."""
    if is_server(uri):
        return None
    url = parse_url(uri)
    return ChangeCounter(Path(str(url.database)).absolute()) if url.get_backend_name() == "sqlite" else None


def _place(model: RegisteredModel, version: str) -> str:
    """The alias that a new version is to have; empty for none."""
    if version in model.aliases.values():
        return ""
    if CHAMPION not in model.aliases:
        return CHAMPION
    return "" if model.canary_share else CHALLENGER


def _version(model: RegisteredModel, number: str) -> ModelVersion:
    for version in model.versions:
        if version.version == number:
            return version
    numbers = ", ".join(version.version for version in model.versions)
    raise InputError(f"{model.name} has no version {number!r}.", hint=f"There are {numbers}.")
