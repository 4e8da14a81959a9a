"""Questions about runs, artifacts and lineage. `measurements` has those about what was measured."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, RowMapping, Table, or_, select

from moestro.artifacts import Input, LifecycleRun, StepRun
from moestro.errors import ArtifactError, InputError
from moestro.registry.index import table_of
from moestro.registry.tables import ArtifactInputRow, ArtifactRow, LifecycleRunRow, StepRunRow
from moestro.registry.views import Edge, IndexedArtifact, Lineage
from moestro.stages import STAGES

RUNS = table_of(LifecycleRunRow)
STEPS = table_of(StepRunRow)
ARTIFACTS = table_of(ArtifactRow)
INPUTS = table_of(ArtifactInputRow)
SHOWN = 5
DIGITS = 16


def runs(connection: Connection, *, name: str | None, limit: int | None) -> list[LifecycleRun]:
    """Lifecycle runs with their steps, newest first."""
    query = select(RUNS).order_by(RUNS.c.started_at.desc(), RUNS.c.id.desc()).limit(limit)
    if name is not None:
        query = query.where(RUNS.c.name == name)
    found = list(connection.execute(query).mappings())
    steps: dict[str, list[StepRun]] = defaultdict(list)
    of_runs = in_chunks(connection, STEPS, STEPS.c.run_id, [row["id"] for row in found])
    for row in sorted(of_runs, key=lambda row: int(row["position"])):
        steps[row["run_id"]].append(StepRun(**_without(row, "run_id", "position")))
    return [LifecycleRun(**row, steps=tuple(steps[row["id"]])) for row in found]


def run(connection: Connection, reference: str) -> LifecycleRun:
    """The run whose id is `reference` or begins with it, or `latest`.

    Raises `InputError` naming candidates when there is none or more than one.
    """
    everything = runs(connection, name=None, limit=None)
    if reference == "latest":
        found = everything[:1]
    else:
        found = [item for item in everything if item.id == reference]
        found = found or [item for item in everything if reference and item.id.startswith(reference)]
    if len(found) != 1:
        problem = "is ambiguous" if found else "does not exist"
        candidates = ", ".join(item.id for item in (found or everything)[:SHOWN]) or "there are none yet"
        raise InputError(f"Run {reference!r} {problem}.", hint=f"Runs: {candidates}.")
    return found[0]


def artifacts(connection: Connection, *, stage: str | None, limit: int | None) -> list[IndexedArtifact]:
    """Artifacts, newest first, of one stage or of all."""
    return _artifacts(connection, [ARTIFACTS.c.stage == stage] if stage is not None else [], limit)


def resolve(connection: Connection, reference: str) -> IndexedArtifact:
    """The one artifact meant by `reference`: a fingerprint or its beginning, a stage, or `stage/beginning`.

    Raises `ArtifactError` naming candidates when there is none or more than one.
    """
    stage, _, prefix = reference.partition("/") if "/" in reference else ("", "", reference)
    if prefix in STAGES and not stage:
        stage, prefix = prefix, ""
    conditions: list[ColumnElement[bool]] = [ARTIFACTS.c.fingerprint.startswith(prefix.lower(), autoescape=True)]
    if stage:
        conditions.append(ARTIFACTS.c.stage == stage)
    found = _artifacts(connection, conditions, SHOWN + 1) if reference else []
    if len(found) == 1:
        return found[0]
    if found:
        more = ", …" if len(found) > SHOWN else ""
        raise ArtifactError(
            f"{reference!r} is ambiguous: {_named(found[:SHOWN])}{more}.", hint="Give more digits of the fingerprint."
        )
    known = _artifacts(connection, [ARTIFACTS.c.stage == stage] if stage else [], SHOWN)
    hint = (
        f"The newest: {_named(known)}." if known else "There are none; `moestro index rebuild` reads the store again."
    )
    raise ArtifactError(f"No artifact {reference!r} in the registry.", hint=hint)


def lineage(connection: Connection, fingerprint: str) -> Lineage:
    """Everything the artifact was made from, and everything made from it; raises `ArtifactError` if unknown."""
    artifact = resolve(connection, fingerprint)
    return Lineage(
        artifact=Input(stage=artifact.stage, fingerprint=artifact.fingerprint),
        ancestors=_edges(connection, artifact.fingerprint, start=INPUTS.c.artifact, end=INPUTS.c.fingerprint),
        descendants=_edges(connection, artifact.fingerprint, start=INPUTS.c.fingerprint, end=INPUTS.c.artifact),
    )


def _edges(
    connection: Connection, fingerprint: str, *, start: ColumnElement[str], end: ColumnElement[str]
) -> tuple[Edge, ...]:
    """Every edge reachable by walking from `start` to `end`. UNION, not UNION ALL: each artifact is visited once."""
    reached = select(end.label("fingerprint")).where(start == fingerprint).cte("reached", recursive=True)
    reached = reached.union(select(end).where(start == reached.c.fingerprint))
    query = (
        select(INPUTS, ARTIFACTS.c.stage.label("target_stage"))
        .join(ARTIFACTS, ARTIFACTS.c.fingerprint == INPUTS.c.artifact)
        .where(or_(start == fingerprint, start.in_(select(reached.c.fingerprint))))
        .order_by(ARTIFACTS.c.created_at, INPUTS.c.artifact, INPUTS.c.role)
    )
    return tuple(
        Edge(
            source=Input(stage=row["stage"], fingerprint=row["fingerprint"]),
            role=row["role"],
            target=Input(stage=row["target_stage"], fingerprint=row["artifact"]),
        )
        for row in connection.execute(query).mappings()
    )


def _artifacts(
    connection: Connection, conditions: Sequence[ColumnElement[bool]], limit: int | None
) -> list[IndexedArtifact]:
    query = (
        select(ARTIFACTS)
        .where(*conditions)
        .order_by(ARTIFACTS.c.created_at.desc(), ARTIFACTS.c.fingerprint)
        .limit(limit)
    )
    found = list(connection.execute(query).mappings())
    inputs: dict[str, dict[str, Input]] = defaultdict(dict)
    of_artifacts = in_chunks(connection, INPUTS, INPUTS.c.artifact, [row["fingerprint"] for row in found])
    for row in of_artifacts:
        inputs[row["artifact"]][row["role"]] = Input(stage=row["stage"], fingerprint=row["fingerprint"])
    return [IndexedArtifact(**row, inputs=dict(sorted(inputs[row["fingerprint"]].items()))) for row in found]


def in_chunks(
    connection: Connection, table: Table, column: ColumnElement[str], values: Sequence[str]
) -> Iterable[RowMapping]:
    """Rows of `table` whose `column` is one of `values`; databases limit how many a statement may name."""
    for start in range(0, len(values), 500):
        yield from connection.execute(select(table).where(column.in_(values[start : start + 500]))).mappings()


def _named(found: Sequence[IndexedArtifact]) -> str:
    return ", ".join(f"{item.stage}/{item.fingerprint[:DIGITS]}" for item in found)


def _without(row: RowMapping, *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}
