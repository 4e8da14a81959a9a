"""The artifact store: a folder of published artifacts, each complete, checked and never changed.

    artifacts/<stage>/<fingerprint, 16 digits>/   published by one atomic rename; holds artifact.json
    work/<stage>/<fingerprint, 16 digits>.<n>/    being made by attempt n: out/ becomes the artifact, scratch/
                                                  holds what an interrupted stage resumes from

A stage whose fingerprint is published is not run again: the store is the cache.
"""

import errno
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from moestro.artifacts.attempt import Attempt, Claimant, attempt
from moestro.artifacts.durable import sync
from moestro.artifacts.fingerprint import content_fingerprint, file_digest
from moestro.artifacts.record import RECORD_NAME, FileEntry, Record
from moestro.errors import ArtifactError, ResourceError

DIGITS = 16


@dataclass(frozen=True)
class Artifact:
    """A published directory. `fingerprint` is its identity, `stage` the kind of thing it is."""

    path: Path
    stage: str
    fingerprint: str

    @property
    def record(self) -> Record:
        """The record beside the bytes."""
        return Record.read(self.path)

    @classmethod
    def open(cls, folder: Path) -> "Artifact":
        """The artifact in `folder`: Moestro's own by its record, anything else by the contents of its files.

        Raises `ArtifactError` if there is nothing, or if a file of Moestro's own is not what was published.
        """
        if (folder / RECORD_NAME).exists():
            record = Record.read(folder)
            verify(folder, record)
            return cls(folder, record.stage, record.fingerprint)
        if not folder.exists():
            raise ArtifactError(f"{folder}: no such file or directory.")
        files = (
            {str(path.relative_to(folder)): path for path in all_files(folder)}
            if folder.is_dir()
            else {folder.name: folder}
        )
        return cls(folder, "files", content_fingerprint(files))


@dataclass(frozen=True)
class WorkFolder:
    """Where a stage works: `out` becomes the artifact, `scratch` survives interruptions and is then removed."""

    attempt: Attempt
    what: str
    """Stage and beginning of the fingerprint."""

    @property
    def out(self) -> Path:
        """Becomes the artifact."""
        return self.attempt.folder / "out"

    @property
    def scratch(self) -> Path:
        """What the next attempt finds if this one does not finish."""
        return self.attempt.folder / "scratch"

    def remove(self) -> None:
        """There is nothing left to do in it."""
        shutil.rmtree(self.attempt.folder, ignore_errors=True)


def all_files(folder: Path) -> list[Path]:
    """Every file under `folder`, sorted by relative path."""
    return sorted(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.relative_to(folder).as_posix()
    )


class ArtifactStore:
    """Finds, checks and publishes artifacts under `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, stage: str, fingerprint: str) -> Path:
        """Where the artifact lies or would lie."""
        return self.root / "artifacts" / stage / fingerprint[:DIGITS]

    def find(self, stage: str, fingerprint: str) -> Artifact | None:
        """The published artifact, its files verified against their digests, or None.

        Raises `ArtifactError` naming the first file that is not what was published.
        """
        folder = self.folder(stage, fingerprint)
        if not folder.exists():
            return None
        record = Record.read(folder)
        if (record.stage, record.fingerprint) != (stage, fingerprint):
            raise ArtifactError(
                f"{folder} holds {record.stage} {record.fingerprint[:DIGITS]}, not {stage} {fingerprint[:DIGITS]}."
            )
        verify(folder, record)
        return Artifact(folder, stage, fingerprint)

    def records(self, stage: str | None = None) -> Iterator[tuple[Path, Record]]:
        """Every published artifact's folder and record, oldest first."""
        found = [
            (path.parent, Record.read(path.parent))
            for path in self.root.glob(f"artifacts/{stage or '*'}/*/{RECORD_NAME}")
        ]
        yield from sorted(found, key=lambda pair: (pair[1].created_at, pair[1].fingerprint))

    @contextmanager
    def work(self, stage: str, fingerprint: str, *, claimant: Claimant | None = None) -> Iterator[WorkFolder]:
        """A folder to make the artifact in; what an interrupted attempt left in `scratch` is still there.

        Raises `BusyError` if another process is making the same artifact that `claimant` does not know to be lost;
        if it still lives, it ends with a `StaleAttemptError` and changes nothing.
        """
        base, what = self.root / "work" / stage / fingerprint[:DIGITS], f"{stage} {fingerprint[:DIGITS]}"
        with disk_space_errors(base), attempt(base, what=what, claimant=claimant) as own:
            work = WorkFolder(own, what)
            if work.out.exists():
                shutil.rmtree(work.out)
            work.scratch.mkdir(exist_ok=True)
            work.out.mkdir()
            yield work

    def publish(self, work: WorkFolder, record: Record) -> Artifact:
        """Write the record, make everything durable, and move the work into place in one atomic step.

        Raises `StaleAttemptError` if a newer attempt has taken over; its folder, and with it the source of that
        step, is then no longer there.
        """
        target = self.folder(record.stage, record.fingerprint)
        work.attempt.check(work.what)
        with disk_space_errors(work.out):
            target.parent.mkdir(parents=True, exist_ok=True)
            (work.out / RECORD_NAME).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
            for path in [*work.out.rglob("*"), work.out]:
                sync(path)
            work.out.replace(target)
            sync(target.parent)
        work.remove()
        return Artifact(target, record.stage, record.fingerprint)


def digest_files(folder: Path, known: Mapping[str, str] | None = None) -> dict[str, FileEntry]:
    """Digest and size of every file under `folder`, but for its record. Those with a `known` digest are not read."""
    names = {path.relative_to(folder).as_posix(): path for path in all_files(folder) if path != folder / RECORD_NAME}
    return {
        name: FileEntry(blake3=(known or {}).get(name) or file_digest(path), size=path.stat().st_size)
        for name, path in names.items()
    }


def verify(folder: Path, record: Record, *, contents: bool = True) -> None:
    """Raise `ArtifactError` naming the first file of `folder` that differs from its record.

    Without `contents` no file is read: those that are missing, of another size, or too many are found all the same.
    """
    hint = (
        "Something changed it after it was published. In a store, delete that folder and it will be made again; "
        f"elsewhere, restore the file, or delete {RECORD_NAME} to use the folder as a plain checkpoint."
    )
    for name, entry in record.files.items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"Corrupted artifact: {path} is missing.", hint=hint)
        if path.stat().st_size != entry.size or (contents and file_digest(path) != entry.blake3):
            raise ArtifactError(f"Corrupted artifact: {path} does not match its digest {entry.blake3[:12]}.", hint=hint)
    strays = {path.relative_to(folder).as_posix() for path in all_files(folder)} - set(record.files) - {RECORD_NAME}
    if strays:
        raise ArtifactError(
            f"Corrupted artifact: {folder} has files that were not published: {sorted(strays)[:3]}.", hint=hint
        )


@contextmanager
def disk_space_errors(where: Path) -> Iterator[None]:
    """Turn a full disk into one readable error, whichever library met it."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        existing = next(folder for folder in [where, *where.absolute().parents] if folder.exists())
        free = shutil.disk_usage(existing).free
        if not _means_full_disk(error) and free > 0:
            raise
        raise ResourceError(
            f"No space left on the disk that holds {where} ({free / 1e6:.0f} MB free).",
            hint="Free some or point MOESTRO_HOME elsewhere, then run the same command again: it resumes.",
        ) from error


def _means_full_disk(error: Exception) -> bool:
    """Only Python's own writes carry an errno; safetensors (Rust) and torch (C++) tell it in their message alone."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"os error {errno.ENOSPC}" in str(error) or "inline_container.cc" in str(error)
