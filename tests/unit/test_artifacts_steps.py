"""Steps: what a stage is shown is what its identity says, and what is written down about the code."""

from pathlib import Path

import pytest

from moestro.config import MixConfig
from moestro.execution import Step, code_version
from moestro.stages import STAGES, flatten, in_order


class _Made:
    def __init__(self, stage: str, fingerprint: str) -> None:
        self.stage, self.fingerprint = stage, fingerprint


def step(*names: str) -> Step:
    branches = {name: _Made("branch", name * 4) for name in names}
    return Step("mix", MixConfig(), {"seed": _Made("seed", "ab"), "branches": branches, "tokens": {}})


def test_the_order_of_domains_is_neither_identity_nor_shown_to_a_stage() -> None:
    one, other = step("prose", "code"), step("code", "prose")
    assert one.identity(one.roles()) == other.identity(other.roles())
    assert list(in_order(one.inputs)["branches"]) == list(in_order(other.inputs)["branches"]) == ["code", "prose"]


def test_another_domain_is_another_identity() -> None:
    one, other = step("code"), step("code", "prose")
    assert one.identity(one.roles()) != other.identity(other.roles())


def test_roles_are_named_by_input_and_domain() -> None:
    assert list(flatten(step("code").inputs)) == ["seed", "branches/code"]
    assert step("code").roles()["branches/code"].stage == "branch"


def test_every_stage_names_where_its_function_lies() -> None:
    for name, stage in STAGES.items():
        module, _, function = stage.function.partition(":")
        assert module.startswith("moestro."), name
        assert function == name


def test_code_version_does_not_need_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code_version().partition("+")[2] == ""
