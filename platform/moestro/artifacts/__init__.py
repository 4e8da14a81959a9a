"""Artifacts: directories with one record beside their bytes, found by what they are and published atomically.

`fingerprint` says what identity is, `record` what is written down, `store` how artifacts are found, checked and
published, `durable` how that survives a loss of power, `digested` how large files are digested while they are written,
`scratch` what interrupted stages left, `lock` who may write, `attempt` that who was thought lost does not, `job` what
a stage is handed, `run` what happened in one run of a lifecycle.
"""

from moestro.artifacts.attempt import Claimant
from moestro.artifacts.digested import DigestedFile
from moestro.artifacts.durable import sync
from moestro.artifacts.fingerprint import canonical_json, content_fingerprint, file_digest, fingerprint
from moestro.artifacts.job import Job, Reporter, SilentReporter
from moestro.artifacts.lock import exclusive
from moestro.artifacts.record import RECORD_NAME, FileEntry, Input, Record
from moestro.artifacts.run import LifecycleRun, Status, StepRun, read_runs
from moestro.artifacts.scratch import Scratch, discard, unfinished
from moestro.artifacts.store import Artifact, ArtifactStore, WorkFolder, digest_files, disk_space_errors, verify

__all__ = [
    "RECORD_NAME",
    "Artifact",
    "ArtifactStore",
    "Claimant",
    "DigestedFile",
    "FileEntry",
    "Input",
    "Job",
    "LifecycleRun",
    "Record",
    "Reporter",
    "Scratch",
    "SilentReporter",
    "Status",
    "StepRun",
    "WorkFolder",
    "canonical_json",
    "content_fingerprint",
    "digest_files",
    "discard",
    "disk_space_errors",
    "exclusive",
    "file_digest",
    "fingerprint",
    "read_runs",
    "sync",
    "unfinished",
    "verify",
]
