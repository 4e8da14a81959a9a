"""The registry's database: concurrent processes, migrations, constraints, readable errors. On SQLite and PostgreSQL."""

import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config as AlembicConfig
from alembic.runtime.migration import MigrationContext
from sqlalchemy import insert, inspect, select, text, update
from sqlalchemy.exc import IntegrityError

from moestro.artifacts import LifecycleRun
from moestro.errors import ConfigError, ResourceError
from moestro.registry import Registry, connect
from moestro.registry import migrations as migrations_package
from moestro.registry.database import open_engine, reading, revision, writing
from moestro.registry.queries import INPUTS, RUNS, STEPS
from moestro.registry.tables import Base

STEP = {
    "run_id": "r",
    "position": 0,
    "name": "seed",
    "stage": "seed",
    "fingerprint": "f" * 64,
    "status": "running",
    "reused": False,
    "started_at": datetime.now(UTC),
    "seconds": 0.0,
    "message": "",
    "mlflow_run_id": "",
}
PROCESSES = 4
INCREMENTS = 200
MIGRATE = """
import sys
from moestro.registry import connect
print("ready", flush=True)
sys.stdin.readline()
print(connect(sys.argv[1]).runs())
"""
INCREMENT = """
import sys
from datetime import UTC, datetime
from sqlalchemy import select, update
from moestro.artifacts import LifecycleRun, StepRun
from moestro.registry import connect
from moestro.registry.database import writing
from moestro.registry.queries import RUNS
registry, name, count = connect(sys.argv[1]), sys.argv[2], int(sys.argv[3])
now = datetime.now(UTC)
steps = 3 * (StepRun(name=name, stage="seed", fingerprint="f" * 64, status="completed", started_at=now),)
print("ready", flush=True)
sys.stdin.readline()
for number in range(count):
    with writing(registry.engine) as connection:
        mine = RUNS.c.id == "shared"
        seconds = connection.scalar(select(RUNS.c.seconds).where(mine).with_for_update())
        connection.execute(update(RUNS).where(mine).values(seconds=seconds + 1))
    for id in (f"{name}-{number}", "contested") if number % 4 == 0 else ():
        registry.index_run(
            LifecycleRun(id=id, name=name, status="completed", config={}, started_at=now, steps=steps)
        )
"""


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'registry.db'}"
    make: Callable[[], str] = request.getfixturevalue("new_postgres_database")
    return make()


def run_together(script: str, arguments: list[list[str]]) -> list[str]:
    """Run `script` once per list of arguments, all let go at the same moment; their outputs."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, *own],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for own in arguments
    ]
    try:
        for process in processes:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin
            process.stdin.write("\n")
            process.stdin.flush()
        results = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), results
    assert [stderr for _, stderr in results] == [""] * len(processes)
    return [stdout for stdout, _ in results]


@pytest.mark.slow
def test_many_processes_migrate_a_fresh_database_at_once(url: str) -> None:
    assert run_together(MIGRATE, [[url]] * PROCESSES) == ["[]\n"] * PROCESSES


@pytest.mark.slow
def test_concurrent_processes_lose_nothing(url: str) -> None:
    registry = connect(url)
    registry.index_run(
        LifecycleRun(id="shared", name="shared", status="running", config={}, started_at=datetime.now(UTC))
    )
    run_together(INCREMENT, [[url, f"writer{number}", str(INCREMENTS)] for number in range(PROCESSES)])
    runs = {run.id: run for run in registry.runs()}
    assert runs["shared"].seconds == PROCESSES * INCREMENTS
    assert len(runs) == PROCESSES * INCREMENTS // 4 + 2
    assert {len(run.steps) for run in runs.values() if run.id != "shared"} == {3}
    registry.close()


def test_migrations_and_models_agree(url: str) -> None:
    registry = connect(url)
    with registry.engine.connect() as connection:
        differences = compare_metadata(
            MigrationContext.configure(
                connection, opts={"compare_type": True, "version_table": migrations_package.VERSION_TABLE}
            ),
            Base.metadata,
        )
        names = set(inspect(connection).get_table_names())
    registry.close()
    assert differences == []
    assert names == {table.name for table in Base.metadata.sorted_tables} | {"moestro_alembic_version"}


def test_constraints_have_the_names_of_the_convention(url: str) -> None:
    registry = connect(url)
    with registry.engine.connect() as connection:
        found = inspect(connection)
        checks = {
            check["name"] for table in ("lifecycle_runs", "step_runs") for check in found.get_check_constraints(table)
        }
        foreign = {key["name"] for key in found.get_foreign_keys("artifact_inputs")}
    registry.close()
    assert checks == {"ck_lifecycle_runs_status", "ck_step_runs_status"}
    assert foreign == {"fk_artifact_inputs_artifact_artifacts"}


def test_downgrade_leaves_nothing_and_can_be_repeated(url: str) -> None:
    registry = connect(url)
    config = AlembicConfig()
    config.set_main_option("script_location", str(Path(str(migrations_package.__file__)).parent))
    for _ in range(2):
        for move, target in ((command.downgrade, "base"), (command.upgrade, "head")):
            with writing(registry.engine) as connection:
                config.attributes["connection"] = connection
                move(config, target)
    with writing(registry.engine) as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
        assert inspect(connection).get_table_names() == ["moestro_alembic_version"]
        assert revision(connection) is None
    registry.close()


def test_foreign_keys_are_enforced_and_cascade(url: str) -> None:
    registry = connect(url)
    orphan = {"artifact": "a" * 64, "role": "seed", "stage": "seed", "fingerprint": "b" * 64}
    with pytest.raises(IntegrityError), writing(registry.engine) as connection:
        connection.execute(insert(INPUTS), [orphan])
    registry.index_run(LifecycleRun(id="r", name="r", status="running", config={}, started_at=datetime.now(UTC)))
    with writing(registry.engine) as connection:
        connection.execute(insert(STEPS), [STEP])
        connection.execute(text("DELETE FROM lifecycle_runs"))
    with reading(registry.engine) as connection:
        assert connection.execute(select(STEPS)).all() == []
    registry.close()


def test_database_refuses_an_unknown_status(url: str) -> None:
    registry = connect(url)
    registry.index_run(LifecycleRun(id="r", name="r", status="running", config={}, started_at=datetime.now(UTC)))
    with pytest.raises(IntegrityError), writing(registry.engine) as connection:
        connection.execute(text("UPDATE lifecycle_runs SET status = 'bored'"))
    registry.close()


def test_naive_moments_are_refused(url: str) -> None:
    registry = connect(url)
    with pytest.raises(Exception, match="has no time zone"), writing(registry.engine) as connection:
        connection.execute(update(RUNS).values(started_at=datetime(2026, 1, 1)))
    registry.close()


def _rename_and_fail(registry: Registry) -> None:
    with writing(registry.engine) as connection:
        connection.execute(update(RUNS).values(name="changed"))
        connection.execute(insert(STEPS), [STEP | {"run_id": "missing"}])


def test_failed_transaction_leaves_nothing(url: str) -> None:
    registry = connect(url)
    run = LifecycleRun(id="r", name="r", status="running", config={}, started_at=datetime.now(UTC))
    registry.index_run(run)
    with pytest.raises(IntegrityError):
        _rename_and_fail(registry)
    assert [item.name for item in registry.runs()] == ["r"]
    registry.close()


def test_schema_of_a_newer_version_is_refused(url: str) -> None:
    registry = connect(url)
    with writing(registry.engine) as connection:
        connection.execute(text("UPDATE moestro_alembic_version SET version_num = '9999'"))
    registry.close()
    with pytest.raises(ResourceError, match=r"'9999', which this version does not know.*newer Moestro"):
        connect(url)


def test_readers_do_not_wait_for_a_writer(tmp_path: Path) -> None:
    registry = connect(f"sqlite:///{tmp_path / 'registry.db'}")
    run = LifecycleRun(id="r", name="before", status="running", config={}, started_at=datetime.now(UTC))
    registry.index_run(run)
    with writing(registry.engine) as connection:
        connection.execute(update(RUNS).values(name="after"))
        assert [item.name for item in registry.runs()] == ["before"]
    assert [item.name for item in registry.runs()] == ["after"]
    registry.close()


def test_unreachable_server_is_one_readable_error_without_the_password(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="cannot be used") as caught:
        connect(f"postgresql://someone:hunter2@/nowhere?host={tmp_path}")
    assert "hunter2" not in str(caught.value)


def test_file_that_is_no_database_is_one_readable_error(tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    path.write_bytes(b"not a database, but long enough to be taken for one" * 100)
    with pytest.raises(ResourceError, match=r"not a database.*moestro index rebuild"):
        connect(f"sqlite:///{path}")


@pytest.mark.parametrize("wrong", ["sqlite://", "sqlite:///:memory:", "mysql://host/name", "registry.db"])
def test_other_databases_are_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match="postgresql://user@host/name"):
        connect(wrong)


def test_postgresql_means_psycopg_3() -> None:
    assert open_engine("postgresql://host/name").driver == "psycopg"
