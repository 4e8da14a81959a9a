"""Making the database again from the records alone."""

from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, delete, text

from moestro.artifacts import ArtifactStore, read_runs
from moestro.registry.index import index_artifact, index_run
from moestro.registry.tables import Base


@dataclass(frozen=True)
class Counts:
    """What was indexed."""

    artifacts: int
    runs: int


def rebuild(connection: Connection, store: ArtifactStore, runs: Path) -> Counts:
    """Replace every row by what the artifacts in `store` and the run records in `runs` say, in one transaction.

    Raises `ArtifactError` naming the first record that cannot be read; then nothing has changed.
    """
    tables = Base.metadata.sorted_tables
    if connection.dialect.name == "postgresql":
        # Readers go on; who indexes meanwhile waits, and then adds to the new rows instead of losing to the old.
        connection.execute(text(f"LOCK TABLE {', '.join(table.name for table in tables)} IN EXCLUSIVE MODE"))
    for table in reversed(tables):
        connection.execute(delete(table))
    artifacts = lifecycles = 0
    for folder, record in store.records():
        index_artifact(connection, folder, record)
        artifacts += 1
    for run in read_runs(runs):
        index_run(connection, run)
        lifecycles += 1
    return Counts(artifacts=artifacts, runs=lifecycles)
