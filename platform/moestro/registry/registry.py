"""`Registry`: one database, each method one transaction."""

from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine

from moestro.artifacts import ArtifactStore, LifecycleRun, Record
from moestro.registry import index, measurements, queries
from moestro.registry import rebuild as rebuilding
from moestro.registry.database import migrate, open_engine, reading, writing
from moestro.registry.rebuild import Counts
from moestro.registry.views import Deployment, Evaluation, ExpertStatistics, IndexedArtifact, Lineage


@dataclass(frozen=True)
class Registry:
    """The index over all records. Every method raises `ResourceError` if the database is lost."""

    engine: Engine

    @classmethod
    def connect(cls, url: str) -> "Registry":
        """The registry at `url` (`sqlite:////path/registry.db`, `postgresql://…`), its schema up to date.

        Raises `ConfigError` for a URL of another kind, `ResourceError` if the database is unreachable or its schema is
        one this version does not know. Safe for many processes at once on a fresh database. Not to be carried into
        another process: each connects by itself.
        """
        engine = open_engine(url)
        migrate(engine)
        return cls(engine)

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    def index_artifact(self, folder: Path, record: Record) -> None:
        """Upsert the artifact in `folder` and what it measured; raises `ArtifactError` if its files are unreadable."""
        with writing(self.engine) as connection:
            index.index_artifact(connection, folder, record)

    def index_run(self, run: LifecycleRun) -> None:
        """Upsert a lifecycle run and its steps."""
        with writing(self.engine) as connection:
            index.index_run(connection, run)

    def rebuild(self, store: ArtifactStore, runs: Path) -> Counts:
        """Make every row again from the records alone; raises `ArtifactError`, changing nothing, if one is bad."""
        with writing(self.engine) as connection:
            return rebuilding.rebuild(connection, store, runs)

    def runs(self, *, name: str | None = None, limit: int | None = None) -> list[LifecycleRun]:
        """Lifecycle runs with their steps, newest first."""
        with reading(self.engine) as connection:
            return queries.runs(connection, name=name, limit=limit)

    def run(self, reference: str) -> LifecycleRun:
        """A run by its id, the beginning of it, or `latest`; raises `InputError` naming candidates."""
        with reading(self.engine) as connection:
            return queries.run(connection, reference)

    def artifacts(self, *, stage: str | None = None, limit: int | None = None) -> list[IndexedArtifact]:
        """Artifacts, newest first, of one stage or of all."""
        with reading(self.engine) as connection:
            return queries.artifacts(connection, stage=stage, limit=limit)

    def resolve(self, reference: str) -> IndexedArtifact:
        """An artifact by fingerprint or its beginning, by stage, or by `stage/beginning`.

        Raises `ArtifactError` naming candidates when there is none or more than one.
        """
        with reading(self.engine) as connection:
            return queries.resolve(connection, reference)

    def lineage(self, reference: str) -> Lineage:
        """What an artifact was made from and what was made from it, over any number of stages."""
        with reading(self.engine) as connection:
            return queries.lineage(connection, reference)

    def evaluations(self, *, run: str) -> list[Evaluation]:
        """The evaluations of a run's checkpoints, in the order in which the checkpoints were made."""
        with reading(self.engine) as connection:
            return measurements.evaluations_of_run(connection, queries.run(connection, run))

    def evaluations_of(self, checkpoint: str) -> list[Evaluation]:
        """The evaluations of one checkpoint (a reference as for `resolve`), oldest first."""
        with reading(self.engine) as connection:
            return measurements.evaluations_of_checkpoint(
                connection, queries.resolve(connection, checkpoint).fingerprint
            )

    def expert_statistics(self, checkpoint: str) -> ExpertStatistics:
        """Who routes where in a checkpoint (a reference as for `resolve`), from its newest profile.

        Raises `ArtifactError` if it was not profiled.
        """
        with reading(self.engine) as connection:
            return measurements.expert_statistics(connection, queries.resolve(connection, checkpoint).fingerprint)

    def deployments(self, *, name: str | None = None) -> list[Deployment]:
        """What passed the deployment gate, newest first."""
        with reading(self.engine) as connection:
            return measurements.deployments(connection, name=name)
