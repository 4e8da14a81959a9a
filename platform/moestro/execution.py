"""Running one stage against a store: find its result, or make and publish it. Knows no orchestrator."""

import ctypes
import gc
import importlib.metadata
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moestro.artifacts import (
    Artifact,
    ArtifactStore,
    Claimant,
    Input,
    Job,
    Record,
    Reporter,
    SilentReporter,
    digest_files,
)
from moestro.config import Config, Resources
from moestro.stages import STAGES, flatten, identify, in_order, source_fingerprints

NOWHERE = Path(os.devnull) / "out"
"""Writing there fails."""


@dataclass(frozen=True)
class Step:
    """A stage with its config and inputs: what is to be made, whether or not it exists yet.

    `inputs` maps the stage's input names to artifacts, or to mappings of them; anything with a `stage` and a
    `fingerprint` will do for `identity`.
    """

    stage: str
    config: Config
    inputs: Mapping[str, Any]

    def roles(self) -> dict[str, Input]:
        """Everything the result depends on besides the config, by role. Reads material from outside the store."""
        made = {
            role: Input(stage=item.stage, fingerprint=item.fingerprint) for role, item in flatten(self.inputs).items()
        }
        outside = source_fingerprints(self.stage, self.config)
        return made | {role: Input(stage="files", fingerprint=value) for role, value in outside.items()}

    def identity(self, roles: Mapping[str, Input]) -> str:
        """The result's fingerprint."""
        return identify(self.stage, self.config, {role: item.fingerprint for role, item in roles.items()})


def run_step(
    store: ArtifactStore,
    step: Step,
    *,
    resources: Resources,
    reporter: Reporter | None = None,
    extras: Mapping[str, Any] | None = None,
    claimant: Claimant | None = None,
    began: Callable[[Path], None] | None = None,
) -> Artifact:
    """The artifact of `step`: the published one if there is one, else made now.

    `extras` are handed to the stage's function beside its inputs (the rollout engine) and never enter identity.
    `claimant` knows who is lost. `began` is told the scratch folder if the stage is to run, for `follow_step`.
    Raises what the stage raises; then nothing is published and the next call resumes from its scratch.
    """
    roles = step.roles()
    identity = step.identity(roles)
    if found := store.find(step.stage, identity):
        return found
    function = STAGES[step.stage].load()
    _use_threads(resources.cpus)
    with store.work(step.stage, identity, claimant=claimant) as work:
        if found := store.find(step.stage, identity):
            work.remove()
            return found
        if began:
            began(work.scratch)
        started = time.monotonic()
        job = Job(out=work.out, scratch=work.scratch, reporter=reporter or SilentReporter(), resources=resources)
        try:
            result = function(step.config, **in_order(step.inputs), **(extras or {}), job=job)
        finally:
            _release_memory()
        record = Record(
            stage=step.stage,
            version=STAGES[step.stage].version,
            fingerprint=identity,
            inputs=roles,
            config=step.config.model_dump(mode="json"),
            result=result,
            files=digest_files(work.out, job.digests),
            code_version=code_version(),
            created_at=datetime.now(UTC),
            seconds=time.monotonic() - started,
        )
        return store.publish(work, record)


def follow_step(step: Step, scratch: Path, *, resources: Resources) -> None:
    """Take part in the training of `step`, which `run_step` runs in another process of the same process group.

    It reads the scratch folder and writes nowhere. Raises what the stage raises.
    """
    from moestro.training.parallel import Followed

    function = STAGES[step.stage].load()
    _use_threads(resources.cpus)
    job = Job(out=NOWHERE, scratch=scratch, resources=resources)
    try:
        with suppress(Followed):
            function(step.config, **in_order(step.inputs), job=job)
    finally:
        _release_memory()


def _use_threads(count: int | None) -> None:
    """Prepare torch for a stage; one without a number of threads may do without torch."""
    if count is None:
        return
    import torch

    from moestro_kernels.vector_math import settle_vector_math

    settle_vector_math()
    torch.set_num_threads(count)


def _release_memory() -> None:
    """Hand back what the stage has freed: models in reference cycles, and the pages that glibc keeps of every thread
    that ever held one. In a process that runs stage after stage they would add up to many models."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def code_version() -> str:
    """Moestro's version, with the commit when it runs from a git checkout."""
    version = importlib.metadata.version("moestro")
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return version
    command = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{version}+{commit.stdout.strip()}" if commit.returncode == 0 else version
