"""Material from outside becomes an artifact of a store, so that what is served cannot change or go away."""

import shutil
from datetime import UTC, datetime
from pathlib import Path

from moestro.artifacts import (
    RECORD_NAME,
    Artifact,
    ArtifactStore,
    Record,
    content_fingerprint,
    digest_files,
    disk_space_errors,
    verify,
)
from moestro.errors import InputError
from moestro.execution import code_version

FILES = "files"
"""What a folder without a record is, in place of a stage."""


def adopt(store: ArtifactStore, artifact: Artifact) -> Artifact:
    """`artifact` in `store`: the one there, or a copy that is published now, under the same stage and fingerprint.

    A folder of Moestro's own keeps its record; any other gets one that says so (stage `files`). Links are followed.
    Raises `InputError` if the folder changes while it is copied, `ArtifactError` if it, or what the store has of it, is
    damaged, `BusyError` if another process is copying it, `ResourceError` if the disk is full.
    """
    if found := store.find(artifact.stage, artifact.fingerprint):
        return found
    began = datetime.now(UTC)
    with store.work(artifact.stage, artifact.fingerprint) as work:
        with disk_space_errors(work.out):
            names = _copy(artifact.path, work.out)
        if artifact.stage != FILES:
            record = artifact.record
            verify(work.out, record)
            return store.publish(work, record)
        if content_fingerprint({name: work.out / name for name in names}) != artifact.fingerprint:
            raise InputError(f"{artifact.path} changed while it was read.", hint="Try again when it is complete.")
        now = datetime.now(UTC)
        record = Record(
            stage=FILES,
            version="1",
            fingerprint=artifact.fingerprint,
            inputs={},
            config={},
            result={},
            files=digest_files(work.out),
            code_version=code_version(),
            created_at=now,
            seconds=(now - began).total_seconds(),
        )
        return store.publish(work, record)


def _copy(folder: Path, out: Path) -> list[str]:
    """Copy every file of `folder` but its record, and return their names."""
    files = (path for path in folder.rglob("*") if path.is_file() and path != folder / RECORD_NAME)
    names = sorted(path.relative_to(folder).as_posix() for path in files)
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, out / name)
    return names
