"""What is worse, not whole or makes no sense is refused before anything changes, with figures and a way out."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest

from moestro.artifacts import Record
from moestro.deployment import comparison
from moestro.errors import ArtifactError, BusyError, ConflictError, GateError, InputError
from moestro_services.promotion import FORCED_TAG

Deploying = Any
"""`services.conftest.Deploying`."""


def test_a_worse_version_is_refused_with_figures_unless_a_reason_is_given(
    desk: Any, deploying: Deploying, refusing: Callable[..., None]
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
    desk: Any, deploying: Deploying, monkeypatch: pytest.MonkeyPatch
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
    desk: Any, deploying: Deploying, stage: str, missing: bool
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


def test_a_lost_champion_can_be_replaced_with_a_reason_alone(desk: Any, deploying: Deploying) -> None:
    champion = deploying("a")
    desk.register(champion, deploying("b"))
    shutil.rmtree(champion.path)
    with pytest.raises(GateError, match="champion assistant@1 cannot be compared with"):
        desk.promote()
    desk.promote(force="it is gone")
    assert desk.state[0]["champion"] == "2"


def test_a_deployment_that_is_not_whole_is_not_registered(desk: Any, deploying: Deploying) -> None:
    artifact = deploying("a")
    shutil.rmtree(deploying.home.store.folder("compress", artifact.record.inputs["model"].fingerprint))
    with pytest.raises(ArtifactError, match="checkpoint of this deployment"):
        desk.register(artifact)
    assert desk.models.models() == ()
    assert desk.audit.last["outcome"] == "refused"
    with pytest.raises(ArtifactError, match="is not a deployment"):
        desk.register(deploying._build.add("compress x", {}))


def test_the_reason_of_a_forced_deployment_stays_with_its_version(desk: Any, deploying: Deploying) -> None:
    done = desk.promotions.register(deploying("a", forced="no time"), actor="test")
    assert done.forced == "no time"
    assert desk.models.model("assistant").versions[0].tags[FORCED_TAG] == "no time"


MISTAKES: list[tuple[Callable[[Any], object], str, str]] = [
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


def test_what_makes_no_sense_names_what_would_and_is_written_down(desk: Any, deploying: Deploying) -> None:
    desk.register(deploying("a"), deploying("b"))
    for act, words, hint in MISTAKES:
        with pytest.raises(InputError) as refused:
            act(desk)
        assert words in refused.value.message
        assert hint in refused.value.hint
        assert (desk.audit.last["outcome"], desk.audit.last["error"]) == ("refused", "InputError")
    assert desk.state == ({"champion": "1", "challenger": "2"}, 0.0)


def test_a_canary_needs_a_champion(desk: Any, deploying: Deploying) -> None:
    desk.register(deploying("a"), deploying("b"))
    desk.models.change("assistant", aliases={"champion": None})
    with pytest.raises(ConflictError, match="no champion to share"):
        desk.promote("2", share=0.1)
    with pytest.raises(ConflictError, match="has no champion"):
        desk.rollback()
    assert dict(desk.promote().aliases) == {"champion": "2"}


def test_an_aliased_version_is_not_deleted_and_another_one_is(desk: Any, deploying: Deploying) -> None:
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
