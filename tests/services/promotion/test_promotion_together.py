"""Several who decide at once: one after the other, each on what is, or not at all."""

import subprocess
import sys
from typing import Any

import pytest

from moestro.deployment import comparison
from moestro.errors import BusyError
from moestro.registry import ModelChangedError, ModelRegistry
from moestro_services.promotion import ATTEMPTS

Deploying = Any
"""`services.conftest.Deploying`."""

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


def test_a_decision_is_made_anew_if_the_champion_changed_meanwhile(
    desk: Any, deploying: Deploying, monkeypatch: pytest.MonkeyPatch
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
    desk: Any, deploying: Deploying, monkeypatch: pytest.MonkeyPatch
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


def test_a_fault_is_written_down_too(desk: Any, deploying: Deploying, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.register(deploying("a"), deploying("b"))

    def broken(*_: Any, **__: Any) -> list[str]:
        raise KeyError("gate")

    monkeypatch.setattr(comparison, "refusals", broken)
    with pytest.raises(KeyError):
        desk.promote()
    assert (desk.audit.last["outcome"], desk.audit.last["version"]) == ("failed", "2")


@pytest.mark.slow
def test_two_processes_that_promote_at_once_do_so_one_after_the_other(desk_in: Any, deploying: Deploying) -> None:
    desk = desk_in(deploying.home)
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
