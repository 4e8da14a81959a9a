"""Opening a database so that concurrent processes lose nothing, and bringing its schema up to date once.

SQLite: write-ahead log, and every writing transaction takes the write lock at its start (BEGIN IMMEDIATE). With
deferred transactions, read-modify-write from several processes loses updates even in WAL mode. PostgreSQL: psycopg 3.
"""

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config as AlembicConfig
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event, func, make_url, select
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, DBAPIError

from moestro.artifacts import exclusive
from moestro.errors import ConfigError, ResourceError
from moestro.registry.migrations import VERSION_TABLE

BUSY_SECONDS = 30
LOCK_KEY = 0x6D6F6573  # "moes": PostgreSQL's advisory locks are plain numbers
SQLITE_HINT = (
    "If it is damaged: registry.db is only an index, which `moestro index rebuild` makes again once it is deleted; "
    "mlflow.db also holds who gets traffic, so bring that one back from a backup."
)
EXAMPLES = "Use e.g. sqlite:////path/registry.db or postgresql://user@host/name."


def parse_url(url: str) -> URL:
    """`url` with its driver chosen; raises `ConfigError` for anything but a SQLite file or PostgreSQL."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise ConfigError("The database URL cannot be read.", hint=EXAMPLES) from None
    backend = parsed.get_backend_name()
    if backend == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        raise ConfigError(f"Unsupported database {backend!r}: SQLite and PostgreSQL are.", hint=EXAMPLES)
    if not parsed.database or parsed.database == ":memory:":
        raise ConfigError("An in-memory SQLite database cannot be shared between processes.", hint=EXAMPLES)
    return parsed


def open_engine(url: str) -> Engine:
    """An engine for `url` with the settings above. Connects to nothing yet."""
    parsed = parse_url(url)
    if parsed.get_backend_name() == "postgresql":
        return create_engine(parsed, pool_pre_ping=True, connect_args={"connect_timeout": 10})
    Path(str(parsed.database)).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(parsed, connect_args={"timeout": BUSY_SECONDS})
    event.listen(engine, "connect", _set_up_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _set_up_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver would start transactions itself, deferred ones
    connection.execute("PRAGMA foreign_keys=ON")
    connection.execute("PRAGMA synchronous=NORMAL")


def _begin_sqlite(connection: Connection) -> None:
    reading = connection.get_execution_options().get("read_only", False)
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """One transaction that may write; raises `ResourceError` when the database cannot be reached."""
    with _readable_errors(engine.url), engine.begin() as connection:
        yield connection


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """One consistent snapshot; on SQLite it neither waits for a writer nor keeps one waiting."""
    with _readable_errors(engine.url), engine.execution_options(read_only=True).begin() as connection:
        yield connection


@contextmanager
def _readable_errors(url: URL) -> Iterator[None]:
    """Turn a lost or broken database into one readable error; mistakes in statements pass as they are."""
    try:
        yield
    except DBAPIError as error:
        name = type(error.orig).__name__
        if name not in ("OperationalError", "DatabaseError", "InternalError") and not error.connection_invalidated:
            raise
        hint = SQLITE_HINT if url.get_backend_name() == "sqlite" else "Is the server running, does the database exist?"
        cause = str(error.orig).strip().splitlines()[0]
        raise ResourceError(f"The database {shown(url)} cannot be used: {cause}.", hint=hint) from error


def shown(url: URL) -> str:
    """`url` without its password."""
    return url.render_as_string(hide_password=True)


@contextmanager
def initialising(engine: Engine) -> Iterator[None]:
    """Hold the right to set up the database of `engine`; everyone else, in whatever process, waits."""
    if engine.dialect.name == "sqlite":
        path = Path(str(engine.url.database))
        with exclusive(path.with_name(f"{path.name}.lock"), what=str(path), wait=True):
            yield
        return
    with _readable_errors(engine.url), engine.connect() as connection:
        connection.execute(select(func.pg_advisory_lock(LOCK_KEY)))
        try:
            yield
        finally:
            connection.execute(select(func.pg_advisory_unlock(LOCK_KEY)))


def write_ahead_log(path: Path) -> None:
    """Make the SQLite file `path` use its write-ahead log, for good. Nobody else may have it open meanwhile.

    Raises `ResourceError` if it is no SQLite file or cannot be written.
    """
    try:
        with closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
    except sqlite3.DatabaseError as error:
        raise ResourceError(f"{path} cannot be used as a SQLite database: {error}.", hint=SQLITE_HINT) from None


def migrate(engine: Engine) -> None:
    """Bring the schema up to date. Many processes may do this at once on a fresh database.

    Raises `ResourceError` if the database is unreachable or has a schema this version does not know.
    """
    logging.getLogger("alembic").setLevel(logging.WARNING)
    config = AlembicConfig()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    script = ScriptDirectory.from_config(config)
    known = {revision.revision for revision in script.walk_revisions()}
    with initialising(engine):
        if engine.dialect.name == "sqlite":
            write_ahead_log(Path(str(engine.url.database)))
        with writing(engine) as connection:
            current = revision(connection)
            if current == script.get_current_head():
                return
            if current is not None and current not in known:
                raise ResourceError(
                    f"The database {shown(engine.url)} has schema {current!r}, which this version does not know.",
                    hint="A newer Moestro made it: use that one, or another database and `moestro index rebuild`.",
                )
            config.attributes["connection"] = connection
            command.upgrade(config, "head")


def revision(connection: Connection) -> str | None:
    """The schema's revision; None for a fresh database."""
    return MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE}).get_current_revision()
