"""What goes wrong while a failure is written down does not take the failure's place."""

from pathlib import Path
from typing import Any

import pytest

from moestro.artifacts import read_runs
from moestro.cluster import Cluster
from moestro.config import load_lifecycle
from moestro.errors import InputError, ResourceError, named, noting
from moestro.execution import Step
from moestro_flows.home import Home
from moestro_flows.session import Session
from moestro_flows.tracking import Tracking

TINY = Path(__file__).parents[1] / "e2e" / "tiny.yaml"


class FullDisk:
    """Tracking, a run in it, or the registry: whatever it is told to finish, it cannot."""

    run_id = id = ""

    def start(self, *_: Any, **__: Any) -> "FullDisk":
        return self

    def finish(self, *_: Any, **__: Any) -> None:
        raise OSError("No space left on device")


def test_a_step_fails_with_its_own_error_where_tracking_fails_too() -> None:
    broken: Any = FullDisk()
    tracking = Tracking(broken, broken, broken, broken)
    step: Any = type("Step", (), {"stage": "tune", "config": load_lifecycle(TINY)})
    failing = tracking.step("tune", step, "f" * 64, reused=False)
    with pytest.raises(InputError, match="no tokens") as raised, failing:
        raise InputError("There are no tokens.")
    assert raised.value.__notes__ == ["While this was dealt with: OSError: No space left on device"]


@pytest.mark.parametrize("error", [InputError("There are no tokens."), KeyboardInterrupt()])
def test_a_run_ends_with_its_own_error_and_leaves_the_cluster(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[Cluster] = []

    def shutdown(cluster: Cluster) -> None:
        left.append(cluster)

    monkeypatch.setattr(Tracking, "open", lambda *_: FullDisk())
    monkeypatch.setattr(Cluster, "shutdown", shutdown)
    home = Home(tmp_path)
    with pytest.raises(type(error)) as raised, Session.open(home, load_lifecycle(TINY)) as session:
        raise error
    assert raised.value is error
    assert left == [session.cluster]
    assert [run.status for run in read_runs(home.runs)] == ["failed" if isinstance(error, InputError) else "cancelled"]
    with pytest.raises(OSError, match="No space"), Session.open(home, load_lifecycle(TINY)) as session:
        session.finish()


def test_an_interrupt_is_never_noted_away() -> None:
    with pytest.raises(KeyboardInterrupt), noting(ValueError("first")):
        raise KeyboardInterrupt


def test_only_errors_without_a_class_get_a_name() -> None:
    def make(error: Exception) -> InputError:
        return InputError(f"unreadable: {error}")

    with pytest.raises(InputError, match="unreadable: variant"), named(make):
        raise Exception("variant")
    for other in (ValueError("mine"), KeyboardInterrupt()):
        with pytest.raises(type(other)), named(make):
            raise other


def test_ray_that_takes_too_long_to_start_is_told_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def init(**_: Any) -> None:
        raise Exception("The current node timed out during startup. This could happen because")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ResourceError, match=r"Ray does not start: .*node timed out.*than it waits.*RAY_ADDRESS"):
        Cluster(cpus=1).connect()


def test_what_waits_to_be_measured_is_called_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would begin it again on an actor that ends, and tell of each on standard output."""
    import ray

    called_off: list[tuple[str, bool]] = []
    monkeypatch.setattr(ray, "cancel", lambda reference, *, force: called_off.append((reference, force)))
    monkeypatch.setattr(ray, "wait", lambda references, timeout: ([], references))  # noqa: ARG005
    config = load_lifecycle(TINY)
    for reference, step in (("first", Step("evaluate", config.evaluate, {})), ("second", Step("mix", config.mix, {}))):
        Cluster(cpus=1)._end(reference, step, 1, "key")
    assert called_off == [("first", False), ("second", True)]
