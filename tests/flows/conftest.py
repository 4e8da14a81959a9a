"""A store in which a lifecycle is finished, without doing its work."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from moestro.artifacts import ArtifactStore, Record, digest_files
from moestro.config import Config, LifecycleConfig
from moestro.execution import Step
from moestro.stages import STAGES
from moestro_flows.lifecycle import walk
from moestro_flows.plan import PlannedStep


@pytest.fixture
def publish_all() -> Callable[[LifecycleConfig, ArtifactStore], None]:
    """Publishes an artifact for each step under the identity it would have, unless there is one."""

    def publish_steps(config: LifecycleConfig, store: ArtifactStore) -> None:
        def publish(name: str, stage: str, stage_config: Config, **inputs: Any) -> PlannedStep:
            step = Step(stage, stage_config, inputs)
            roles = step.roles()
            identity = step.identity(roles)
            if store.folder(stage, identity).exists():
                return PlannedStep(name, stage, identity, "reuse", "")
            with store.work(stage, identity) as work:
                (work.out / "what.txt").write_text(name)
                record = Record(
                    stage=stage,
                    version=STAGES[stage].version,
                    fingerprint=identity,
                    inputs=roles,
                    config=stage_config.model_dump(mode="json"),
                    result={},
                    files=digest_files(work.out),
                    code_version="test",
                    created_at=datetime.now(UTC),
                    seconds=0.0,
                )
                store.publish(work, record)
            return PlannedStep(name, stage, identity, "run", "")

        walk(config, publish)

    return publish_steps
