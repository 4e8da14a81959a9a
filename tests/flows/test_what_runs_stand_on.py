"""What a run stands on: records of killed runs, the home folder, the Ray cluster."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from moestro.artifacts import LifecycleRun, read_runs
from moestro.cluster import Cluster
from moestro.config import Resources
from moestro.errors import ConfigError, ResourceError, StoppedError
from moestro.inference.engine import EngineConfig
from moestro_flows.home import Home
from moestro_flows.tracking import end_killed


def record(number: int, status: Any) -> LifecycleRun:
    return LifecycleRun(id=f"run-{number}", name="tiny", status=status, config={}, started_at=datetime.now(UTC))


def test_the_next_run_ends_the_record_of_a_killed_one(tmp_path: Path) -> None:
    for number, status in enumerate(["completed", "running", "failed"]):
        record(number, status).write(tmp_path)
    assert [run.id for run in end_killed(tmp_path)] == ["run-1"]
    assert [run.status for run in read_runs(tmp_path)] == ["completed", "cancelled", "failed"]
    assert list(end_killed(tmp_path)) == []


def test_a_folder_that_cannot_be_the_home_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file cannot be the home folder"):
        Home(tmp_path / "file").prepare()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense"])
def test_a_ray_cluster_that_is_not_there_is_named(address: str) -> None:
    with pytest.raises(ResourceError, match=f"no Ray cluster at {address}"):
        Cluster(address).connect()


def test_an_engine_waits_for_no_cluster_that_never_comes(tmp_path: Path) -> None:
    make = Cluster().engine_factory(Resources(), lambda: True)
    with pytest.raises(StoppedError):
        make(tmp_path, EngineConfig())
