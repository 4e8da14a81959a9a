"""`TrackedRun`: one run in MLflow, told about progress, metrics, figures and records by the id it was given."""

import logging
import os
import time
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from moestro.artifacts import Reporter, SilentReporter, Status
from moestro.registry.params import entity_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient

MAX_TAG = 5000
MAX_METRICS = 1000
FLUSH_COUNT = 500
FLUSH_SECONDS = 5.0
ERROR_TAG = "moestro.error"
TERMINAL: Mapping[Status, str] = {"completed": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}


@lru_cache(maxsize=8)
def client(uri: str) -> "MlflowClient":
    """A quiet client for `uri`. Imports MLflow, which takes seconds."""
    # MLflow knows no other way: otherwise it reports usage to its makers, and prints a line for every run that ends.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


class TrackedRun:
    """One MLflow run; a `Reporter`. Metrics are buffered: `flush` or `finish` writes the rest.

    Can be sent to another process (Ray): what is buffered here stays here.
    """

    def __init__(self, uri: str, id: str, *, listener: Reporter | None = None) -> None:  # noqa: A002
        self.uri = uri
        self.id = id
        self.listener = listener or SilentReporter()
        self._buffer: list[tuple[str, float, int, int]] = []
        self._flushed_at = time.monotonic()

    def __reduce__(self) -> tuple[Any, ...]:
        return TrackedRun, (self.uri, self.id)

    def progress(self, done: int, total: int, message: str = "") -> None:
        """Forward to the listener; MLflow keeps no progress."""
        self.listener.progress(done, total, message)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Buffer figures at a step; characters that MLflow refuses in names become `_`."""
        self.listener.metrics(values, step)
        now = int(time.time() * 1000)
        self._buffer += [(entity_name(name), float(value), now, step) for name, value in values.items()]
        if len(self._buffer) >= FLUSH_COUNT or time.monotonic() - self._flushed_at > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is buffered."""
        from mlflow.entities import Metric

        buffered, self._buffer = self._buffer, []
        self._flushed_at = time.monotonic()
        for start in range(0, len(buffered), MAX_METRICS):
            batch = [Metric(*item) for item in buffered[start : start + MAX_METRICS]]
            client(self.uri).log_batch(self.id, metrics=batch)

    def log_record(self, record: BaseModel | Mapping[str, Any], name: str = "record.json") -> None:
        """Keep a record, or any JSON values by name, with the run."""
        content = record.model_dump(mode="json") if isinstance(record, BaseModel) else dict(record)
        client(self.uri).log_dict(self.id, content, name)

    def log_figure(self, name: str, figure: "Figure") -> None:
        """Keep a figure as `figures/<name>.png`."""
        client(self.uri).log_figure(self.id, figure, f"figures/{name}.png", save_kwargs={"dpi": 144})

    def log_table(self, name: str, columns: Mapping[str, Iterable[Any]]) -> None:
        """Keep a table, one list a column, as `tables/<name>.json`, which MLflow shows and compares."""
        table = {key: list(values) for key, values in columns.items()}
        client(self.uri).log_table(self.id, table, f"tables/{name}.json")

    def tag(self, name: str, value: str) -> None:
        """Set a tag; long values are cut."""
        client(self.uri).set_tag(self.id, name, value[:MAX_TAG])

    def finish(self, status: Status = "completed", message: str = "") -> None:
        """Write the rest and close the run; `message` says what went wrong. Doing it again does no harm."""
        self.flush()
        if message:
            self.tag(ERROR_TAG, message)
        client(self.uri).set_terminated(self.id, TERMINAL[status])
