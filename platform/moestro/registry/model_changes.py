"""`ChangeCounter`: whether a SQLite database was written to since, for some microseconds instead of a query."""

import sqlite3
import threading
from pathlib import Path

BUSY_SECONDS = 30
Stamp = tuple[int, int]
"""Which file, and its `PRAGMA data_version`."""


class ChangeCounter:
    """Watches the database file `path`, which need not be there. May be asked from several threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._file = -1

    def now(self) -> Stamp | None:
        """Another value than before once anybody has committed anything; None where that cannot be told.

        Read it before the data: then data are never older than their stamp.
        """
        with self._lock:
            try:
                file = self._path.stat().st_ino
                if self._connection is None or file != self._file:
                    self._open(file)
                assert self._connection is not None
                return file, self._connection.execute("PRAGMA data_version").fetchone()[0]
            except (FileNotFoundError, sqlite3.DatabaseError):
                return None

    def _open(self, file: int) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        # mode=rw never makes a file; SQLite needs to write beside one that has a write-ahead log, even to read it.
        self._connection = sqlite3.connect(
            f"{self._path.as_uri()}?mode=rw",
            uri=True,
            timeout=BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
        self._file = file
