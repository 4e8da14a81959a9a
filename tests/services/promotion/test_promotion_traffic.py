"""Who gets traffic is decided by promotion, canary and rollback, once, and written down."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from moestro.errors import ConflictError
from moestro_flows.home import Home

Deploying = Any
"""`services.conftest.Deploying`."""


def test_the_first_is_champion_later_ones_challengers_and_again_changes_nothing(
    desk: Any, deploying: Deploying
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


def test_a_home_without_mlflow_gets_it_with_the_first_version(
    desk_in: Any, tmp_path: Path, deploying: Deploying
) -> None:
    artifact = deploying("a")
    for path in deploying.home.path.glob("mlflow*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert desk_in(Home(tmp_path / "other")).models.models() == ()
    desk = desk_in(deploying.home)
    desk.register(artifact)
    assert desk.state == ({"champion": "1"}, 0.0)


def test_promotion_moves_the_champion_and_rollback_takes_it_back_and_forth(desk: Any, deploying: Deploying) -> None:
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


def test_what_was_rolled_back_does_not_come_back_by_registering_it(desk: Any, deploying: Deploying) -> None:
    second = deploying("b")
    desk.register(deploying("a"), second)
    desk.promote(share=0.1)
    desk.rollback()
    desk.register(second)
    assert desk.state == ({"champion": "1"}, 0.0)


def test_a_canary_gets_its_share_and_is_ended_by_rollback_or_promotion(desk: Any, deploying: Deploying) -> None:
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


def test_rolling_back_a_version_that_has_no_traffic_changes_nothing(desk: Any, deploying: Deploying) -> None:
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


def test_promoting_the_champion_says_so_and_changes_nothing(desk: Any, deploying: Deploying) -> None:
    desk.register(deploying("a"), deploying("b"))
    for options in ({}, {"share": 0.1}, {"force": "why not"}):
        assert not desk.promote("champion", **options).changed
    assert desk.audit.last["outcome"] == "unchanged"
    assert desk.state == ({"champion": "1", "challenger": "2"}, 0.0)
    assert desk.changes == 2


def test_a_promotion_that_died_before_its_last_write_is_completed(desk: Any, deploying: Deploying) -> None:
    desk.register(deploying("a"), deploying("b"))
    desk.models.change("assistant", aliases={"champion": "2", "previous": "1"})
    assert desk.state[0]["challenger"] == "2"
    desk.promote()
    assert desk.state == ({"champion": "2", "previous": "1"}, 0.0)
