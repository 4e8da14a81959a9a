"""Promotions: who gets traffic is decided on whole artifacts and honest comparisons, once, and written down."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from moestro.artifacts import Artifact, Record
from moestro.deployment import comparison
from moestro.errors import ArtifactError, BusyError, ConflictError, GateError, InputError
from moestro.registry import ModelChangedError, ModelRegistry
from moestro_flows.home import Home
from moestro_services.promotion import ATTEMPTS, FORCED_TAG, Promotions

Deploying = Any
"""`conftest.Deploying`."""

PROMOTE = """
import sys
from pathlib import Path
from moestro_flows.home import Home
from moestro_services.audit import Audit
from moestro_services.promotion import Promotions
home = Home(Path(sys.argv[1]))
promotions = Promotions(home, Audit(home.path / "audit.jsonl"))
promotions._models.models()
print("ready", flush=True)
sys.stdin.readline()
promotions.promote("assistant", sys.argv[2], actor="test")
"""


class Written:
    """An audit log in memory."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, str, str, dict[str, Any]]] = []

    def write(self, actor: str, action: str, target: str, **details: Any) -> None:
        self.entries.append((actor, action, target, details))

    @property
    def last(self) -> dict[str, Any]:
        actor, action, target, details = self.entries[-1]
        return {"actor": actor, "action": action, "target": target} | details


class Desk:
    """Promotions with what they tell, and a way to look at the model."""

    def __init__(self, home: Home) -> None:
        self.audit = Written()
        self.changes = 0
        self.promotions = Promotions(home, self.audit, changed=self._changed)
        self.models = ModelRegistry(home.mlflow_uri, home.mlflow_files)

    def _changed(self) -> None:
        self.changes += 1

    def register(self, *artifacts: Artifact) -> None:
        for artifact in artifacts:
            self.promotions.register(artifact, actor="test")

    def promote(self, version: str = "challenger", **options: Any) -> Any:
        return self.promotions.promote("assistant", version, actor="test", **options)

    def rollback(self, **options: Any) -> Any:
        return self.promotions.rollback("assistant", actor="test", **options)

    @property
    def state(self) -> tuple[Mapping[str, str], float]:
        model = self.models.model("assistant")
        return model.aliases, model.canary_share


@pytest.fixture
def desk(deploying: Deploying) -> Desk:
    return Desk(deploying.home)


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the comparison with the champion refuse in the given words."""

    def refuse(*words: str) -> None:
        monkeypatch.setattr(comparison, "refusals", lambda *_, **__: list(words))

    return refuse


def test_the_first_is_champion_later_ones_challengers_and_again_changes_nothing(
    desk: Desk, deploying: Deploying
) -> None:
    first = desk.promotions.register(deploying("a"), actor="key-1")
    assert (first.name, first.version, dict(first.aliases), first.changed) == (
        "assistant",
        "1",
        {"champion": "1"},
        True,
    )
    assert desk.audit.last["actor"] == "key-1"
    assert (desk.audit.last["action"], desk.audit.last["outcome"]) == ("register", "changed")
    second = deploying("b")
    desk.register(second)
    assert desk.state == ({"champion": "1", "challenger": "2"}, 0.0)
    assert desk.changes == 2
    assert not desk.promotions.register(second, actor="test").changed
    assert desk.changes == 2
    assert desk.audit.last["outcome"] == "unchanged"
    desk.register(deploying("c"))
    assert desk.state == ({"champion": "1", "challenger": "3"}, 0.0)


def test_a_home_without_mlflow_gets_it_with_the_first_version(tmp_path: Path, deploying: Deploying) -> None:
    artifact = deploying("a")
    for path in deploying.home.path.glob("mlflow*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert Desk(Home(tmp_path / "other")).models.models() == ()
    desk = Desk(deploying.home)
    desk.register(artifact)
    assert desk.state == ({"champion": "1"}, 0.0)


def test_promotion_moves_the_champion_and_rollback_takes_it_back_and_forth(desk: Desk, deploying: Deploying) -> None:
    desk.register(deploying("a"), deploying("b"))
    done = desk.promote()
    assert (done.version, dict(done.aliases)) == ("2", {"champion": "2", "previous": "1"})
    assert desk.audit.last == {
        "actor": "test",
        "action": "promote",
        "target": "assistant",
        "outcome": "changed",
        "asked": "challenger",
        "share": None,
        "force": "",
        "version": "2",
        "refused": [],
        "from": {"champion": "1", "challenger": "2"},
        "to": {"champion": "2", "previous": "1"},
        "canary_share": 0.0,
    }
    assert dict(desk.rollback(reason="slow").aliases) == {"champion": "1", "previous": "2"}
    assert desk.audit.last["reason"] == "slow"
    assert dict(desk.rollback().aliases) == {"champion": "2", "previous": "1"}
    assert desk.changes == 5


def test_what_was_rolled_back_does_not_come_back_by_registering_it(desk: Desk, deploying: Deploying) -> None:
    second = deploying("b")
    desk.register(deploying("a"), second)
    desk.promote(share=0.1)
    desk.rollback()
    desk.register(second)
    assert desk.state == ({"champion": "1"}, 0.0)


def test_a_canary_gets_its_share_and_is_ended_by_rollback_or_promotion(desk: Desk, deploying: Deploying) -> None:
    desk.register(deploying("a"), deploying("b"), deploying("c"))
    done = desk.promote("2", share=0.1)
    assert (dict(done.aliases), done.canary_share) == ({"champion": "1", "challenger": "2"}, 0.1)
    assert desk.promote("2", share=0.5).canary_share == 0.5
    done = desk.rollback()
    assert (done.version, dict(done.aliases), done.canary_share) == ("2", {"champion": "1"}, 0.0)
    with pytest.raises(ConflictError, match="no version to go back to") as refused:
        desk.rollback()
    assert "moestro promote NAME@VERSION" in refused.value.hint
    assert (desk.audit.last["outcome"], desk.audit.last["error"]) == ("refused", "ConflictError")
    desk.promote("3", share=0.25)
    desk.register(deploying("d"))
    assert desk.state == ({"champion": "1", "challenger": "3"}, 0.25)
    desk.promote()
    assert desk.state == ({"champion": "3", "previous": "1"}, 0.0)


def test_rolling_back_a_version_that_has_no_traffic_changes_nothing(desk: Desk, deploying: Deploying) -> None:
    """Two watchers of one canary must not roll back the champion between them."""
    desk.register(deploying("a"), deploying("b"))
    desk.promote()
    desk.register(deploying("c"))
    desk.promote("3", share=0.1)
    assert desk.rollback(version="3", reason="errors").changed
    assert not desk.rollback(version="3", reason="errors").changed
    assert desk.state == ({"champion": "2", "previous": "1"}, 0.0)
    desk.promote("3", share=0.1)
    assert dict(desk.rollback(version="2").aliases) == {"champion": "1", "previous": "2", "challenger": "3"}


def test_promoting_the_champion_says_so_and_changes_nothing(desk: Desk, deploying: Deploying) -> None:
    desk.register(deploying("a"), deploying("b"))
    for options in ({}, {"share": 0.1}, {"force": "why not"}):
        assert not desk.promote("champion", **options).changed
    assert desk.audit.last["outcome"] == "unchanged"
    assert desk.state == ({"champion": "1", "challenger": "2"}, 0.0)
    assert desk.changes == 2


def test_a_promotion_that_died_before_its_last_write_is_completed(desk: Desk, deploying: Deploying) -> None:
    desk.register(deploying("a"), deploying("b"))
    desk.models.change("assistant", aliases={"champion": "2", "previous": "1"})
    assert desk.state[0]["challenger"] == "2"
    desk.promote()
    assert desk.state == ({"champion": "2", "previous": "1"}, 0.0)


def test_a_worse_version_is_refused_with_figures_unless_a_reason_is_given(
    desk: Desk, deploying: Deploying, refusing: Callable[..., None]
) -> None:
    desk.register(deploying("a"), deploying("b"))
    refusing("held-out loss of code rose by 0.3", "memory is 1.4 times the champion's")
    for options in ({}, {"share": 0.1}, {"force": "   "}):
        with pytest.raises(GateError, match=r"assistant@2 is not promoted: held-out loss .* 0\.3; memory is 1\.4"):
            desk.promote(**options)
        assert desk.audit.last["outcome"] == "refused"
        assert desk.audit.last["refused"] == ["held-out loss of code rose by 0.3", "memory is 1.4 times the champion's"]
    assert desk.state == ({"champion": "1", "challenger": "2"}, 0.0)
    done = desk.promote(force="the bug is worse")
    assert (done.forced, len(done.refused), dict(done.aliases)) == (
        "the bug is worse",
        2,
        {"champion": "2", "previous": "1"},
    )
    assert desk.models.model("assistant").versions[0].tags[FORCED_TAG] == "the bug is worse"
    assert desk.audit.last["force"] == "the bug is worse"


def test_the_comparison_gets_both_deployments_and_their_results(
    desk: Desk, deploying: Deploying, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def refusals(candidate: Any, champion: Any, *, result: Any, champion_result: Any) -> list[str]:
        seen.update(candidate=candidate, champion=champion, result=result, champion_result=champion_result)
        return []

    monkeypatch.setattr(comparison, "refusals", refusals)
    desk.register(deploying("a", gate={"n": 1}))
    assert seen == {}
    desk.register(deploying("b", gate={"n": 2}))
    desk.promote()
    assert (seen["candidate"]["gate"], seen["champion"]["gate"]) == ({"n": 2}, {"n": 1})
    assert seen["result"] == seen["champion_result"] == {"load_seconds": 1.5}


@pytest.mark.parametrize("stage", ["deploy", "compress"])
@pytest.mark.parametrize("missing", [True, False])
def test_a_version_that_is_not_whole_is_refused_before_anything_changes(
    desk: Desk, deploying: Deploying, stage: str, missing: bool
) -> None:
    candidate = deploying("b")
    desk.register(deploying("a"), candidate)
    before = desk.state
    folder = candidate.path
    if stage == "compress":
        folder = deploying.home.store.folder("compress", candidate.record.inputs["model"].fingerprint)
    if missing:
        shutil.rmtree(folder)
    else:
        (folder / next(iter(Record.read(folder).files))).write_text("{}")
    for act in (desk.promote, lambda: desk.promote(share=0.1), lambda: desk.promote(force="now")):
        with pytest.raises(ArtifactError, match="not in this home's store" if missing else "Corrupted"):
            act()
        assert desk.audit.last["outcome"] == "refused"
    assert desk.state == before
    desk.models.change("assistant", aliases={"champion": "1", "previous": "2", "challenger": None})
    with pytest.raises(ArtifactError):
        desk.rollback()
    assert desk.state[0] == {"champion": "1", "previous": "2"}


def test_a_lost_champion_can_be_replaced_with_a_reason_alone(desk: Desk, deploying: Deploying) -> None:
    champion = deploying("a")
    desk.register(champion, deploying("b"))
    shutil.rmtree(champion.path)
    with pytest.raises(GateError, match="champion assistant@1 cannot be compared with"):
        desk.promote()
    desk.promote(force="it is gone")
    assert desk.state[0]["champion"] == "2"


def test_a_deployment_that_is_not_whole_is_not_registered(desk: Desk, deploying: Deploying) -> None:
    artifact = deploying("a")
    shutil.rmtree(deploying.home.store.folder("compress", artifact.record.inputs["model"].fingerprint))
    with pytest.raises(ArtifactError, match="checkpoint of this deployment"):
        desk.register(artifact)
    assert desk.models.models() == ()
    assert desk.audit.last["outcome"] == "refused"
    with pytest.raises(ArtifactError, match="is not a deployment"):
        desk.register(deploying._build.add("compress x", {}))


def test_the_reason_of_a_forced_deployment_stays_with_its_version(desk: Desk, deploying: Deploying) -> None:
    done = desk.promotions.register(deploying("a", forced="no time"), actor="test")
    assert done.forced == "no time"
    assert desk.models.model("assistant").versions[0].tags[FORCED_TAG] == "no time"


MISTAKES: list[tuple[Callable[[Desk], object], str, str]] = [
    (
        lambda desk: desk.promote("9"),
        "no version or alias '9'",
        "versions 2, 1, and @challenger (2), @champion (1)",
    ),
    (lambda desk: desk.promote("previous"), "no version or alias 'previous'", "@champion (1)"),
    (lambda desk: desk.promote(share=0.0), "between 0 and 1", ""),
    (lambda desk: desk.promote(share=1.0), "between 0 and 1", "Without one"),
    (lambda desk: desk.promote(share=float("nan")), "between 0 and 1", ""),
    (lambda desk: desk.promotions.promote("nobody", actor="t"), "No model 'nobody'", "There are assistant."),
    (lambda desk: desk.promotions.rollback("nobody", actor="t"), "No model 'nobody'", "There are assistant."),
    (lambda desk: desk.promotions.delete("assistant", "9", actor="t"), "no version or alias '9'", "versions 2, 1"),
    (lambda desk: desk.promotions.delete("assistant", "champion", actor="t"), "@champion is an alias", "number"),
    (lambda desk: desk.rollback(version="9"), "no version or alias '9'", ""),
]


def test_what_makes_no_sense_names_what_would_and_is_written_down(desk: Desk, deploying: Deploying) -> None:
    desk.register(deploying("a"), deploying("b"))
    for act, words, hint in MISTAKES:
        with pytest.raises(InputError) as refused:
            act(desk)
        assert words in refused.value.message
        assert hint in refused.value.hint
        assert (desk.audit.last["outcome"], desk.audit.last["error"]) == ("refused", "InputError")
    assert desk.state == ({"champion": "1", "challenger": "2"}, 0.0)


def test_a_canary_needs_a_champion(desk: Desk, deploying: Deploying) -> None:
    desk.register(deploying("a"), deploying("b"))
    desk.models.change("assistant", aliases={"champion": None})
    with pytest.raises(ConflictError, match="no champion to share"):
        desk.promote("2", share=0.1)
    with pytest.raises(ConflictError, match="has no champion"):
        desk.rollback()
    assert dict(desk.promote().aliases) == {"champion": "2"}


def test_an_aliased_version_is_not_deleted_and_another_one_is(desk: Desk, deploying: Deploying) -> None:
    third = deploying("c")
    desk.register(deploying("a"), deploying("b"), third)
    with pytest.raises(BusyError, match="@champion"):
        desk.promotions.delete("assistant", "1", actor="test")
    assert desk.audit.last["outcome"] == "refused"
    desk.promotions.delete("assistant", "2", actor="test")
    assert (desk.audit.last["action"], desk.audit.last["outcome"], desk.audit.last["version"]) == (
        "delete",
        "changed",
        "2",
    )
    assert [version.version for version in desk.models.model("assistant").versions] == ["3", "1"]
    assert deploying.home.store.find("deploy", third.fingerprint)


def test_a_decision_is_made_anew_if_the_champion_changed_meanwhile(
    desk: Desk, deploying: Deploying, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.register(deploying("a"), deploying("b"), deploying("c"))
    champions: list[Any] = []

    def refusals(candidate: Any, champion: Any, **_: Any) -> list[str]:
        if not champions:
            desk.models.change("assistant", aliases={"champion": "2", "challenger": None})
        champions.append(champion["checkpoint"])
        return []

    monkeypatch.setattr(comparison, "refusals", refusals)
    assert dict(desk.promote().aliases) == {"champion": "3", "previous": "2"}
    assert len(champions) == 2
    assert champions[0] != champions[1]
    assert desk.audit.last["from"] == {"champion": "2"}


def test_a_model_that_never_rests_is_given_up_and_a_rollback_at_once(
    desk: Desk, deploying: Deploying, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.register(deploying("a"), deploying("b"))
    desk.promote()
    asked: list[object] = []

    def change(*arguments: Any, **named: Any) -> Any:
        asked.append(named)
        raise ModelChangedError("Somebody else changed assistant meanwhile.")

    monkeypatch.setattr(ModelRegistry, "change", change)
    with pytest.raises(BusyError, match="changed all the time"):
        desk.promote("1")
    assert len(asked) == ATTEMPTS
    with pytest.raises(ModelChangedError):
        desk.rollback()
    assert desk.audit.last["outcome"] == "refused"


def test_a_fault_is_written_down_too(desk: Desk, deploying: Deploying, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.register(deploying("a"), deploying("b"))

    def broken(*_: Any, **__: Any) -> list[str]:
        raise KeyError("gate")

    monkeypatch.setattr(comparison, "refusals", broken)
    with pytest.raises(KeyError):
        desk.promote()
    assert (desk.audit.last["outcome"], desk.audit.last["version"]) == ("failed", "2")


@pytest.mark.slow
def test_two_processes_that_promote_at_once_do_so_one_after_the_other(deploying: Deploying) -> None:
    desk = Desk(deploying.home)
    desk.register(*(deploying(letter) for letter in "abc"))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROMOTE, str(deploying.home.path), version],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for version in ("2", "3")
    ]
    try:
        for process in processes:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin
            process.stdin.write("\n")
            process.stdin.flush()
        results = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], results
    assert desk.state[0] in ({"champion": "2", "previous": "3"}, {"champion": "3", "previous": "2"})
