"""Writing records into the tables. Indexing anything again replaces what was known about it: same rows, no doubles.

Upserting the owner's row first locks it, so that two processes that index the same thing do so one after the other.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sqlalchemy import Connection, Table, delete, insert
from sqlalchemy.dialects import postgresql, sqlite

from moestro.artifacts import LifecycleRun, Record
from moestro.errors import ArtifactError
from moestro.registry.tables import (
    ArtifactInputRow,
    ArtifactRow,
    Base,
    DeploymentRow,
    ExpertRow,
    ExpertStatisticRow,
    HeldOutLossRow,
    LayerStatisticRow,
    LifecycleRunRow,
    StepRunRow,
    TaskResultRow,
)

Row = dict[str, Any]
OWNED = (
    (ArtifactInputRow, "artifact"),
    (HeldOutLossRow, "evaluation"),
    (TaskResultRow, "evaluation"),
    (ExpertRow, "artifact"),
    (ExpertStatisticRow, "profile"),
    (LayerStatisticRow, "profile"),
    (DeploymentRow, "artifact"),
)
"""The tables whose rows come from one artifact, and the column that names it."""


class Rows(NamedTuple):
    """Rows for one table."""

    table: type[Base]
    rows: list[Row]


def index_artifact(connection: Connection, folder: Path, record: Record) -> None:
    """Upsert an artifact, its lineage and, read from `folder`, what it measured.

    Raises `ArtifactError` if a file that its stage publishes is missing or unreadable.
    """
    measured = [rows for read in _readers(folder, record) for rows in read(folder, record)]
    _upsert(connection, ArtifactRow, _artifact_row(record))
    for owned, owner in OWNED:
        table = table_of(owned)
        connection.execute(delete(table).where(table.c[owner] == record.fingerprint))
    for found in [Rows(ArtifactInputRow, _input_rows(record)), *measured]:
        if found.rows:
            connection.execute(insert(table_of(found.table)), found.rows)


def index_run(connection: Connection, run: LifecycleRun) -> None:
    """Upsert a lifecycle run and its steps."""
    dumped = json.loads(run.model_dump_json(exclude={"steps", "format"}))
    _upsert(connection, LifecycleRunRow, {**dumped, "started_at": run.started_at})
    steps = table_of(StepRunRow)
    connection.execute(delete(steps).where(steps.c.run_id == run.id))
    if run.steps:
        rows = [{"run_id": run.id, "position": at, **step.model_dump()} for at, step in enumerate(run.steps)]
        connection.execute(insert(steps), rows)


def table_of(kind: type[Base]) -> Table:
    """The table behind a row class."""
    table = kind.__table__
    assert isinstance(table, Table)
    return table


def _upsert(connection: Connection, kind: type[Base], row: Row) -> None:
    table = table_of(kind)
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    keys = [column.name for column in table.primary_key]
    values = {name: value for name, value in row.items() if name not in keys}
    connection.execute(dialect.insert(table).values(row).on_conflict_do_update(index_elements=keys, set_=values))


def _artifact_row(record: Record) -> Row:
    names = ("fingerprint", "stage", "version", "config", "result", "code_version", "seconds")
    # Through JSON: the record in memory may hold tuples or NaN, the one read back from its file does not.
    dumped = json.loads(record.model_dump_json(include=set(names)))
    return {**dumped, "created_at": record.created_at, "size": record.size}


def _input_rows(record: Record) -> list[Row]:
    return [
        {"artifact": record.fingerprint, "role": role, "stage": item.stage, "fingerprint": item.fingerprint}
        for role, item in record.inputs.items()
    ]


def _readers(folder: Path, record: Record) -> Iterable[Callable[[Path, Record], list[Rows]]]:
    """What reads the measurements of a record's stage; any artifact may say where its experts come from."""
    if reader := READERS.get(record.stage):
        yield reader
    if (folder / "experts.json").exists():
        yield _read_experts


def _read_evaluation(folder: Path, record: Record) -> list[Rows]:
    content = _read_json(folder / "evaluation.json")
    checkpoint = _checkpoint(folder, record)
    shared = {"evaluation": record.fingerprint, "checkpoint": checkpoint}
    tokens = record.result.get("tokens", {})
    losses = [
        {**shared, "domain": domain, "loss": _finite(loss), "tokens": tokens.get(domain, 0)}
        for domain, loss in content["held_out_loss"].items()
    ]
    task = content.get("task")
    results = (
        [{**shared, "task": task["name"], "problems": task["problems"], "accuracy": task["accuracy"]}] if task else []
    )
    return [Rows(HeldOutLossRow, losses), Rows(TaskResultRow, results)]


def _read_profile(folder: Path, record: Record) -> list[Rows]:
    tensors = _read_tensors(folder / "routing.safetensors")
    shared = {"profile": record.fingerprint, "checkpoint": _checkpoint(folder, record)}
    domains = sorted(name.removeprefix("counts/") for name in tensors if name.startswith("counts/"))
    experts: list[Row] = []
    layers: list[Row] = []
    for domain in domains:
        counts_LE, gate_mass_LE = tensors[f"counts/{domain}"], tensors[f"gate_mass/{domain}"]
        tokens = int(tensors[f"tokens/{domain}"].item())
        layers += [{**shared, "layer": layer, "domain": domain, "tokens": tokens} for layer in range(len(counts_LE))]
        experts += [
            {
                **shared,
                "layer": layer,
                "expert": expert,
                "domain": domain,
                "tokens": int(count),
                "gate_mass": float(gate_mass_LE[layer, expert]),
            }
            for (layer, expert), count in np.ndenumerate(counts_LE)
        ]
    return [Rows(ExpertStatisticRow, experts), Rows(LayerStatisticRow, layers)]


def _read_experts(folder: Path, record: Record) -> list[Rows]:
    origins = _read_json(folder / "experts.json")["origins"]
    rows = [
        {"artifact": record.fingerprint, "layer": layer, "expert": expert, "origin": origin}
        for layer, names in enumerate(origins)
        for expert, origin in enumerate(names)
    ]
    return [Rows(ExpertRow, rows)]


def _read_deployment(folder: Path, record: Record) -> list[Rows]:
    content = _read_json(folder / "deployment.json")
    row = {
        "artifact": record.fingerprint,
        "name": content["name"],
        "checkpoint": content["checkpoint"]["fingerprint"],
        "checkpoint_stage": content["checkpoint"]["stage"],
        "dtype": content["dtype"],
        "max_model_len": content["max_model_len"],
        "gates": content.get("gates", {}),
    }
    return [Rows(DeploymentRow, [row])]


READERS: Mapping[str, Callable[[Path, Record], list[Rows]]] = {
    "evaluate": _read_evaluation,
    "profile": _read_profile,
    "deploy": _read_deployment,
}


def _checkpoint(folder: Path, record: Record) -> str:
    """Fingerprint of the checkpoint that was measured."""
    if "model" not in record.inputs:
        raise ArtifactError(f"{folder}: its record names no input `model`, so what it measured is unknown.")
    return record.inputs["model"].fingerprint


def _finite(value: float | None) -> float | None:
    """A loss that is not a number as NULL: SQLite cannot keep NaN."""
    return value if value is not None and math.isfinite(value) else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError) as error:
        raise _unreadable(path, error) from None
    return dict(content)


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return dict(load_file(path))
    except (FileNotFoundError, SafetensorError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> ArtifactError:
    cause = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
    return ArtifactError(f"{path} {cause}.", hint="Delete that artifact's folder; it will be made again.")
