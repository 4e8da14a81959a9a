"""Artifacts: directories with one record beside their bytes, found by what they are and published atomically.

`fingerprint` says what identity is, `record` what is written down, `store` how artifacts are found, checked and
published, `lock` who may write, `job` what a stage is handed, `run` what happened in one run of a lifecycle.
"""

from moestro.artifacts.fingerprint import canonical_json, content_fingerprint, file_digest, fingerprint
from moestro.artifacts.job import Job, Reporter, SilentReporter
from moestro.artifacts.lock import exclusive
from moestro.artifacts.record import RECORD_NAME, FileEntry, Input, Record
from moestro.artifacts.run import LifecycleRun, Status, StepRun, read_runs
from moestro.artifacts.store import Artifact, ArtifactStore, WorkFolder, digest_files, disk_space_errors, verify

__all__ = [
    "RECORD_NAME",
    "Artifact",
    "ArtifactStore",
    "FileEntry",
    "Input",
    "Job",
    "LifecycleRun",
    "Record",
    "Reporter",
    "SilentReporter",
    "Status",
    "StepRun",
    "WorkFolder",
    "canonical_json",
    "content_fingerprint",
    "digest_files",
    "disk_space_errors",
    "exclusive",
    "file_digest",
    "fingerprint",
    "read_runs",
    "verify",
]
