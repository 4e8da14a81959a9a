"""A domain whose text would run out in a branch or in `tune` is told of before the first branch trains."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from moestro.artifacts import Artifact, read_runs
from moestro.cluster import Cluster
from moestro.config import LifecycleConfig, load_lifecycle
from moestro.errors import ConfigError, InputError
from moestro.execution import Step
from moestro_flows.home import Home
from moestro_flows.preflight import check_text
from moestro_flows.session import Session
from moestro_flows.tracking import Tracking

TINY = Path(__file__).parents[1] / "e2e" / "tiny.yaml"
ALL = frozenset({"branch code", "branch math", "tune"})


def tiny(**training: dict[str, Any]) -> LifecycleConfig:
    """The tiny lifecycle with other fields in the training of the named sections."""
    data = load_lifecycle(TINY).model_dump(mode="json", exclude_unset=True)
    for section, fields in training.items():
        data[section]["training"] |= fields
    return LifecycleConfig.model_validate(data)


@pytest.fixture
def tokens(tmp_path: Path) -> Callable[..., dict[str, Artifact]]:
    """Tokens artifacts with that many training tokens."""

    def make(**counts: int) -> dict[str, Artifact]:
        for name, count in counts.items():
            folder = tmp_path / "tokens" / name
            folder.mkdir(parents=True)
            np.save(folder / "train.npy", np.zeros(count, dtype=np.uint16))
            np.save(folder / "train_documents.npy", np.zeros(1, dtype=np.int64))
        return {name: Artifact(tmp_path / "tokens" / name, "tokens", name) for name in counts}

    return make


def test_enough_text_passes(tokens: Callable[..., dict[str, Artifact]]) -> None:
    check_text(tiny(), tokens(code=5000, math=5000), ALL)


def test_all_steps_that_run_out_are_told_at_once(tokens: Callable[..., dict[str, Artifact]]) -> None:
    made = tokens(code=5000, math=257)  # four windows of 64 tokens, and 8 sequences a step
    config = tiny(tune={"steps": 200})
    with pytest.raises(ConfigError) as raised:
        check_text(config, made, ALL)
    assert raised.value.message.splitlines() == [
        "branch math: Domain 'math' runs out of data: 40 steps would go through its 257 tokens 80.0 times, "
        "training.max_epochs is 50.",
        "tune: Domain 'math' runs out of data: 200 steps would go through its 257 tokens 200.0 times, "
        "training.max_epochs is 50.",
    ]
    assert raised.value.hint.startswith("Give it more text, shorten the training")
    check_text(tiny(branch={"max_epochs": 80}, tune={"max_epochs": 200}), made, ALL)


def test_a_budget_in_tokens_counts_and_general_text_too(tokens: Callable[..., dict[str, Artifact]]) -> None:
    config = tiny(branch={"steps": None, "tokens": 40 * 8 * 64}).model_dump(mode="json")
    config["branch"]["general_share"] = 0.75
    made = tokens(code=257, math=257 * 3)
    with pytest.raises(ConfigError, match=r"branch math: Domain 'code' runs out of data: 40 steps .* 60\.0 times"):
        check_text(LifecycleConfig.model_validate(config), made, frozenset({"branch math"}))


def test_only_steps_that_are_to_run_and_whose_steps_are_known_count(
    tokens: Callable[..., dict[str, Artifact]],
) -> None:
    made = tokens(code=5000, math=257)
    check_text(tiny(), made, frozenset({"branch code"}))
    check_text(tiny(branch={"steps": None, "minutes": 60}), made, ALL - {"tune"})
    with pytest.raises(ConfigError, match=r"^branch math: "):
        check_text(tiny(), made, frozenset({"branch math"}))


def test_a_domain_that_fills_no_sequence_is_told_of(tokens: Callable[..., dict[str, Artifact]]) -> None:
    with pytest.raises(InputError, match="Domain 'math' has 64 training tokens"):
        check_text(tiny(), tokens(code=5000, math=64), frozenset({"tune"}))


class Nowhere:
    """Tracking, and a step in it, that keeps nothing."""

    run_id = ""

    def step(self, *_: Any, **__: Any) -> "Nowhere":
        return self

    def __enter__(self) -> "Nowhere":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def finish(self, *_: Any, **__: Any) -> None:
        return None


def test_the_first_branch_does_not_begin(
    tokens: Callable[..., dict[str, Artifact]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tracking, "open", lambda *_: Nowhere())
    monkeypatch.setattr(Cluster, "run", lambda *_, **__: pytest.fail("a branch trains"))
    config, made, home = tiny(), tokens(code=5000, math=257), Home(tmp_path / "home")
    step = Step("branch", config.branch_configs()["code"], {"tokens": made["code"]})
    with (
        pytest.raises(ConfigError, match=r"branch math: .*\ntune: "),
        Session.open(home, tiny(tune={"max_epochs": 1})) as session,
    ):
        session.perform("branch code", step, text=made)
    (run,) = read_runs(home.runs)
    assert (run.status, run.steps[0].status) == ("failed", "failed")
    assert "runs out of data" in run.steps[0].message


def test_every_branch_waits_for_the_text_of_all_domains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESTRO_HOME", str(tmp_path))
    from moestro_flows import stages  # sets the environment that Prefect reads when it is imported

    given: dict[str, dict[str, str] | None] = {}

    class Task:
        def __init__(self, name: str) -> None:
            self.name = name

        def submit(self, _inputs: dict[str, Any], text: dict[str, str] | None) -> str:
            given[self.name] = text
            return f"future of {self.name}"

    monkeypatch.setattr(stages, "_task", lambda _session, name, *_: Task(name))
    session = cast("Session", type("Session", (), {"config": tiny()}))
    assert len(stages._submit_all(session)) == len(given)
    text = {"code": "future of tokens code", "math": "future of tokens math"}
    assert {name: value for name, value in given.items() if value is not None} == {
        "branch code": text,
        "branch math": text,
    }
