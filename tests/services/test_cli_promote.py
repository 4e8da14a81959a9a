"""`moestro deploy`, `promote`, `rollback` and `show models`: what they print, refuse and write down."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moestro.artifacts import Artifact, Job
from moestro.config import DeployConfig
from moestro.deployment import comparison
from moestro.errors import ConfigError, GateError, InputError, MoestroError
from moestro.registry import connect
from moestro_services.audit import Audit
from moestro_services.cli import deploy as deploy_command
from moestro_services.cli.app import app
from moestro_services.promotion import Promotions

Deploying = Any
"""`conftest.Deploying`."""


def run(*arguments: str) -> str:
    """What a command prints."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exception is None, result.exception
    return result.stdout


def told(*arguments: str) -> Any:
    """What a command prints with --json."""
    return json.loads(run(*arguments, "--json"))


def mistake(*arguments: str) -> MoestroError:
    """The error that a command ends with."""
    result: Any = CliRunner().invoke(app, list(arguments))
    assert isinstance(result.exception, MoestroError), result.exception
    return result.exception


@pytest.fixture
def three(deploying: Deploying) -> Deploying:
    """A home with three versions: a champion, a challenger, and one without an alias."""
    promotions = Promotions(deploying.home, Audit.of(deploying.home))
    for letter in "abc":
        promotions.register(deploying(letter), actor="test")
    promotions.promote("assistant", "2", share=0.05, actor="test")
    return deploying


def test_promote_and_rollback_tell_what_they_did(three: Deploying) -> None:
    done = told("promote", "assistant@3", "--share", "0.1")
    assert done == {
        "name": "assistant",
        "version": "3",
        "aliases": {"champion": "1", "challenger": "3"},
        "canary_share": 0.1,
        "forced": "",
        "refused": [],
        "changed": True,
    }
    assert "assistant@3 is the champion now." in run("promote", "assistant")
    assert "assistant@3 is the champion already; nothing was changed." in run("promote", "assistant@champion")
    printed = run("rollback", "assistant", "--reason", "too slow")
    assert printed == "assistant@3 was rolled back.\nassistant: @champion 1, @previous 3\n"
    assert told("rollback", "assistant")["aliases"] == {"champion": "3", "previous": "1"}
    printed = run("promote", "assistant@2", "--share", "0.125")
    assert "assistant@2 is a canary now.\n" in printed
    assert "assistant: @challenger 2 (gets 12.50% of the requests), @champion 3, @previous 1\n" in printed
    actions = [(entry.action, entry.actor.startswith("cli:")) for entry in Audit.of(three.home).read(6)]
    assert [action for action, _ in actions[::-1]] == ["promote"] * 3 + ["rollback"] * 2 + ["promote"]
    assert all(typed for _, typed in actions)
    assert Audit.of(three.home).read(3)[2].details["reason"] == "too slow"


def test_a_refused_promotion_is_an_error_and_can_be_forced(three: Deploying, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "refusals", lambda *_, **__: ["accuracy fell by [0.2]"])
    error = mistake("promote", "assistant")
    assert isinstance(error, GateError)
    assert "accuracy fell by [0.2]" in error.message
    assert "--force REASON" in error.hint
    printed = run("promote", "assistant", "--force", "we know")
    assert "overridden: accuracy fell by [0.2]" in printed
    assert "we know" in run("show", "models")
    assert Audit.of(three.home).read(1)[0].details["force"] == "we know"


def test_mistakes_name_what_there_is(three: Deploying) -> None:
    for arguments, words, hint in [
        (["promote", "assistant@7"], "no version or alias '7'", "versions 3, 2, 1"),
        (["promote", "helper"], "No model 'helper'", "There are assistant."),
        (["promote", "assistant@"], "expected NAME or NAME@VERSION", "moestro show models"),
        (["promote", "@champion"], "expected NAME or NAME@VERSION", ""),
        (["promote", "assistant@2", "--share", "1"], "between 0 and 1", ""),
        (["rollback", "assistant@1"], "goes where @previous points", "moestro promote assistant@1"),
    ]:
        error = mistake(*arguments)
        assert isinstance(error, InputError)
        assert words in error.message
        assert hint in error.hint


def test_show_models_lists_versions_with_aliases_and_share(three: Deploying) -> None:
    models = told("show", "models")["models"]
    assert [(model["name"], model["aliases"], model["canary_share"]) for model in models] == [
        ("assistant", {"champion": "1", "challenger": "2"}, 0.05)
    ]
    versions = models[0]["versions"]
    assert [(version["version"], version["aliases"]) for version in versions] == [
        ("3", []),
        ("2", ["challenger"]),
        ("1", ["champion"]),
    ]
    assert all(len(version["fingerprint"]) == 64 for version in versions)
    lines = [line.split() for line in run("show", "models").splitlines()]
    assert [line[:3] for line in lines if line and line[0].startswith("assistant@")][1] == [
        "assistant@2",
        "@challenger",
        "5.00%",
    ]


def test_show_models_of_a_home_without_any_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESTRO_HOME", str(tmp_path / "empty home"))
    assert told("show", "models") == {"models": []}
    assert "moestro deploy" in " ".join(run("show", "models").split())
    assert not (tmp_path / "empty home").exists()


class Gate:
    """Stands for the deploy stage: looks at nothing, writes a deployment, or refuses."""

    def __init__(self) -> None:
        self.refusal = ""
        self.seen: list[tuple[str, list[str]]] = []

    def __call__(self, config: Any, *, model: Artifact, tokens: Any, job: Job) -> dict[str, Any]:
        self.seen.append((model.stage, sorted(tokens)))
        forced = getattr(config, "force", "")
        if self.refusal and not forced:
            raise GateError(self.refusal)
        content = {
            "name": config.name,
            "checkpoint": {"stage": model.stage, "fingerprint": model.fingerprint},
            "dtype": config.dtype,
            "max_model_len": config.max_model_len,
            "forced": forced,
            "gate": {"figures": {}},
        }
        (job.out / "deployment.json").write_text(json.dumps(content))
        return {"load_seconds": 2.0}


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    made = Gate()
    monkeypatch.setattr("moestro.deployment.deploy", made)
    return made


@pytest.fixture
def outside(tmp_path: Path) -> list[str]:
    """A Hugging Face folder, a config and tokens, none of them in the home, as a command's arguments."""
    folder = tmp_path / "hf model"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "weights").write_bytes(b"weights")
    (folder / "link").symlink_to(folder / "config.json")
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "ids").write_bytes(b"1")
    config = tmp_path / "deploy.yaml"
    config.write_text("{name: helper, max_model_len: 256}")
    return [str(folder), "--config", str(config), "--tokens", f"code={tmp_path / 'tokens'}"]


def test_a_folder_from_outside_is_deployed_from_a_copy_and_registered_once(
    deploying: Deploying, gate: Gate, outside: list[str]
) -> None:
    done = told("deploy", *outside)
    assert (done["name"], done["version"], done["aliases"]) == ("helper", "1", {"champion": "1"})
    assert done["result"] == {"load_seconds": 2.0}
    assert gate.seen == [("files", ["code"])]
    home = deploying.home
    deployment = home.store.find("deploy", done["fingerprint"])
    assert deployment
    shutil.rmtree(outside[0])
    kept = home.store.find("files", deployment.record.inputs["model"].fingerprint)
    assert kept
    assert sorted(kept.record.files) == ["config.json", "link", "sub/weights"]
    assert (kept.path / "sub" / "weights").read_bytes() == b"weights"
    again = told("deploy", str(kept.path), *outside[1:])
    assert (again["version"], again["changed"], again["fingerprint"]) == ("1", False, done["fingerprint"])
    assert len(gate.seen) == 1
    assert told("deploy", kept.fingerprint[:12], *outside[1:])["changed"] is False
    registry = connect(home.database_url)
    assert {"deploy", "files"} <= {item.stage for item in registry.artifacts()}
    registry.close()
    assert told("index", "rebuild")["artifacts"] == 2
    assert [item["stage"] for item in told("show", "artifacts")["artifacts"]].count("files") == 1


def test_an_artifact_of_the_home_needs_no_copy(deploying: Deploying, gate: Gate, outside: list[str]) -> None:
    deploying("a")
    done = told("deploy", "compress", *outside[1:])
    assert gate.seen == [("compress", ["code"])]
    assert done["aliases"] == {"champion": "1"}
    alone = mistake("promote", "helper")
    assert "no version or alias 'challenger'" in alone.message
    assert "`moestro deploy`" in alone.hint
    assert not (deploying.home.path / "artifacts" / "files").exists()


def test_a_refusal_of_the_gates_registers_nothing_and_is_written_down(
    deploying: Deploying, gate: Gate, outside: list[str]
) -> None:
    gate.refusal = "log-probabilities differ by up to 3 nats"
    error = mistake("deploy", *outside)
    assert isinstance(error, GateError)
    assert told("show", "models") == {"models": []}
    entry = Audit.of(deploying.home).read(1)[0]
    assert (entry.action, entry.target, entry.details["outcome"]) == ("deploy", "helper", "refused")
    assert gate.refusal in entry.details["message"]
    assert not (deploying.home.path / "artifacts" / "files").exists()


def test_a_config_may_bear_its_stages_name_and_tokens_may_be_a_fingerprint(
    deploying: Deploying, gate: Gate, outside: list[str], tmp_path: Path
) -> None:
    (tmp_path / "deploy.yaml").write_text("deploy: {name: helper, max_model_len: 256}")
    folder = told("deploy", *outside)["fingerprint"]
    checkpoint = deploying.home.store.find("deploy", folder)
    assert checkpoint
    tokens = f"code={checkpoint.fingerprint[:16]}"  # any artifact of this home
    assert told("deploy", *outside[:3], "--tokens", tokens)["name"] == "helper"
    assert gate.seen == [("files", ["code"])] * 2
    assert "No artifact 'cafe'" in mistake("deploy", *outside[:3], "--tokens", "code=cafe").message


def test_without_tokens_those_of_the_lifecycle_are_taken(
    deploying: Deploying, gate: Gate, outside: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = mistake("deploy", *outside[:3])
    assert isinstance(error, ConfigError)
    assert "is no lifecycle" in error.message
    lifecycle = tmp_path / "lifecycle.yaml"
    lifecycle.write_text(LIFECYCLE)
    error = mistake("deploy", outside[0], "--config", str(lifecycle))
    assert "has no tokens of code, prose" in error.message
    assert f"`moestro run {lifecycle}` makes them" in error.hint
    monkeypatch.setattr(deploy_command, "_own_tokens", lambda *_: [f"tokens/prose={tmp_path / 'tokens'}"])
    told("deploy", outside[0], "--config", str(lifecycle))
    assert gate.seen == [("files", ["prose"])]


LIFECYCLE = """
name: small
data:
  domains:
    - {name: code, source: {type: builtin, name: stdlib}}
    - {name: prose, source: {type: builtin, name: docs}}
seed: {type: pretrain, training: {steps: 30}}
branch: {training: {steps: 20}}
deploy: {name: helper}
"""


@pytest.mark.parametrize("arguments", [["missing"], ["nothing/abcdef"]])
def test_a_checkpoint_that_is_not_there_is_named(
    deploying: Deploying, gate: Gate, outside: list[str], arguments: list[str]
) -> None:
    error = mistake("deploy", *arguments, *outside[1:])
    assert f"No artifact {arguments[0].rpartition('/')[2]!r}" in error.message


def test_force_reaches_the_gates_and_stays_with_the_version(
    deploying: Deploying, gate: Gate, outside: list[str]
) -> None:
    if "force" not in DeployConfig.model_fields:
        pytest.skip("the gates know no force")
    gate.refusal = "too slow"
    assert told("deploy", *outside, "--force", "a demo")["forced"] == "a demo"
