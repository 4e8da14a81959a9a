"""Running one stage against a store: find its result, or make and publish it. Knows no orchestrator."""

import importlib.metadata
import subprocess
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moestro.artifacts import Artifact, ArtifactStore, Input, Job, Record, Reporter, digest_files
from moestro.config import Config, Resources
from moestro.stages import STAGES, Inputs, flatten, identify, source_fingerprints


def run_stage(
    store: ArtifactStore,
    stage: str,
    config: Config,
    inputs: Inputs,
    *,
    reporter: Reporter,
    resources: Resources,
    extras: Mapping[str, Any] | None = None,
) -> Artifact:
    """The artifact of `stage` for `config` and `inputs`: the published one if there is one, else made now.

    `extras` are handed to the stage's function beside its inputs (the rollout engine) and never enter identity.
    Raises what the stage raises; then nothing is published and the next call resumes from its scratch.
    """
    roles = {role: Input(stage=item.stage, fingerprint=item.fingerprint) for role, item in flatten(inputs).items()}
    sources = source_fingerprints(stage, config)
    roles |= {role: Input(stage="files", fingerprint=value) for role, value in sources.items()}
    identity = identify(stage, config, {role: item.fingerprint for role, item in roles.items()})
    if found := store.find(stage, identity):
        return found
    function = STAGES[stage].load()
    with store.work(stage, identity) as work:
        if found := store.find(stage, identity):
            return found
        if resources.cpus:
            import torch

            torch.set_num_threads(resources.cpus)
        started = time.monotonic()
        job = Job(out=work.out, scratch=work.scratch, reporter=reporter, resources=resources)
        result = function(config, **inputs, **(extras or {}), job=job)
        record = Record(
            stage=stage,
            version=STAGES[stage].version,
            fingerprint=identity,
            inputs=roles,
            config=config.model_dump(mode="json"),
            result=result,
            files=digest_files(work.out),
            code_version=code_version(),
            created_at=datetime.now(UTC),
            seconds=time.monotonic() - started,
        )
        return store.publish(work, record)


def code_version() -> str:
    """Moestro's version, with the commit when it runs from a git checkout."""
    version = importlib.metadata.version("moestro")
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return version
    commit = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False
    )
    return f"{version}+{commit.stdout.strip()}" if commit.returncode == 0 else version
