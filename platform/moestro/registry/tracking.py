"""MLflow: one run per lifecycle, and one nested run per step. `model_registry` has the models.

Only `MlflowClient` with explicit run ids is used. MLflow's fluent functions keep the active run per thread, and start
a new one, which then runs for ever, wherever they find none: in threads, Prefect tasks, Ray workers.
"""

import socket
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from moestro.artifacts import Reporter, exclusive
from moestro.errors import ConfigError, ResourceError
from moestro.registry.database import initialising, open_engine, parse_url, write_ahead_log
from moestro.registry.params import flatten_params
from moestro.registry.tracked_run import MAX_TAG, TrackedRun, client

HOME_TAG = "moestro.home"
PARENT_TAG = "mlflow.parentRunId"
MAX_PARAMS = 100
UNPREPARED = "Prepare the tracker first (`Tracker.prepare`)."


class Tracker:
    """MLflow at `uri`, as one home uses it. `files_root` (`file:///…`) is where the embedded store keeps files."""

    def __init__(self, uri: str, files_root: str, *, experiment: str = "moestro") -> None:
        self.uri = uri
        self.files = local_folder(files_root)
        self.experiment = experiment

    def prepare(self) -> None:
        """Create database and experiment if they are not there; once, however many processes ask at the same time.

        Raises `ResourceError` if the tracking server cannot be reached.
        """
        with _only_one(self.uri, self.files):
            home = self.files / "home_id"
            if not home.exists():
                temporary = home.with_suffix(".tmp")
                temporary.write_text(uuid.uuid4().hex)
                temporary.replace(home)
            mlflow = client(self.uri)
            experiment = mlflow.get_experiment_by_name(self.experiment)
            if experiment is None:
                location = None if is_server(self.uri) else f"{self.files.as_uri()}/{self.experiment}"
                mlflow.create_experiment(self.experiment, artifact_location=location)
            elif experiment.lifecycle_stage == "deleted":
                mlflow.restore_experiment(experiment.experiment_id)

    def start(
        self,
        name: str,
        *,
        parent: str | None,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        listener: Reporter | None = None,
    ) -> TrackedRun:
        """A new run, nested under `parent` (a run id). `params` may nest; they are kept as `training.steps`."""
        from mlflow.entities import Param

        own = {HOME_TAG: self._home_id(), **({PARENT_TAG: parent} if parent else {})}
        shortened = {key: value[:MAX_TAG] for key, value in tags.items()}
        mlflow = client(self.uri)
        run = mlflow.create_run(self._experiment_id(), run_name=name, tags={**shortened, **own})
        flat = [Param(key, value) for key, value in flatten_params(params).items()]
        for start in range(0, len(flat), MAX_PARAMS):
            mlflow.log_batch(run.info.run_id, params=flat[start : start + MAX_PARAMS])
        return TrackedRun(self.uri, run.info.run_id, listener=listener)

    def reconcile(self, live: Collection[str] = ()) -> list[str]:
        """Mark runs of this home that still count as running, but are not among `live`, as killed; return their ids.

        A killed process cannot close its runs. Other homes on the same server are left alone.
        """
        query = f"attributes.status = 'RUNNING' AND tags.`{HOME_TAG}` = '{self._home_id()}'"
        mlflow = client(self.uri)
        stale: list[str] = []
        token = None
        while True:
            page = mlflow.search_runs([self._experiment_id()], query, page_token=token)
            stale += [run.info.run_id for run in page if run.info.run_id not in live]
            token = page.token
            if not token:
                break
        for run_id in stale:
            mlflow.set_terminated(run_id, "KILLED")
        return stale

    def _experiment_id(self) -> str:
        experiment = client(self.uri).get_experiment_by_name(self.experiment)
        if experiment is None:
            raise ResourceError(f"MLflow at {shown(self.uri)} has no experiment {self.experiment!r}.", hint=UNPREPARED)
        return str(experiment.experiment_id)

    def _home_id(self) -> str:
        """What tells this home's runs from those of others on the same server."""
        path = self.files / "home_id"
        if not path.exists():
            raise ResourceError(f"{self.files} is no MLflow folder of Moestro's yet.", hint=UNPREPARED)
        return path.read_text()


@contextmanager
def _only_one(uri: str, files: Path) -> Iterator[None]:
    """Hold the right to set up the tracking database; also lays the ground that MLflow does not lay itself."""
    files.mkdir(parents=True, exist_ok=True)
    if is_server(uri):
        reach(uri)
        with exclusive(files / "home.lock", what=str(files), wait=True):
            yield
        return
    engine = open_engine(uri)
    with exclusive(files / "home.lock", what=str(files), wait=True), initialising(engine):
        if engine.dialect.name == "sqlite":
            write_ahead_log(Path(str(engine.url.database)))
        yield
    engine.dispose()


def reach(uri: str) -> None:
    """Raise `ResourceError` at once where MLflow would retry for minutes."""
    parts = urlsplit(uri)
    try:
        socket.create_connection(
            (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)), 10
        ).close()
    except OSError as error:
        raise ResourceError(
            f"The MLflow server {shown(uri)} cannot be reached: {error.strerror or error}.",
            hint="Start it, or unset MLFLOW_TRACKING_URI to use the embedded one.",
        ) from None


def is_server(uri: str) -> bool:
    """Whether `uri` is that of a tracking server, not of a database."""
    return urlsplit(uri).scheme in ("http", "https")


def shown(uri: str) -> str:
    """`uri` without its password; a server's without user as well."""
    if not is_server(uri):
        return parse_url(uri).render_as_string(hide_password=True)
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def local_folder(files_root: str) -> Path:
    """The folder that `files_root` (`file:///…`) names; raises `ConfigError` if it is none on this machine."""
    parts = urlsplit(files_root)
    if parts.scheme != "file" or parts.netloc:
        raise ConfigError(
            f"MLflow's files must lie in a local folder, not in {files_root!r}.", hint="Use file:///path."
        )
    return Path(unquote(parts.path))
