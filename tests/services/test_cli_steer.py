"""`moestro steer` and `moestro stage steer`: a profile of a home's deployment, and what `moestro show` says of it."""

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from moestro.artifacts import Artifact, Input, Record, digest_files, fingerprint
from moestro.config import AnyProfile, PromptContrast, SuppressProfile, validate
from moestro.data.tokenizer import train_bpe
from moestro.errors import ArtifactError, ConfigError, GateError, MoestroError
from moestro.models.checkpoint import save_model
from moestro.models.steering_profiles import Profile
from moestro_flows.home import Home
from moestro_services.cli.app import app
from moestro_services.gateway.deployments import Deployment
from moestro_services.gateway.steering import Steering

DOCS = Path(__file__).resolve().parents[2] / "docs" / "methods" / "steering.md"
GATE = {"sequence_length": 16, "max_tokens": 256, "max_loss_increase": 5.0}


def publish(home: Home, stage: str, fill: Any, inputs: dict[str, Artifact] | None = None) -> Artifact:
    made = {role: Input(stage=item.stage, fingerprint=item.fingerprint) for role, item in (inputs or {}).items()}
    identity = fingerprint(stage, "1", {}, {role: item.fingerprint for role, item in made.items()})
    with home.store.work(stage, identity) as work:
        fill(work.out)
        record = Record(
            stage=stage,
            version="1",
            fingerprint=identity,
            inputs=made,
            config={},
            result={},
            files=digest_files(work.out),
            code_version="test",
            created_at=datetime(2026, 1, 1, tzinfo=UTC),
            seconds=1.0,
        )
        return home.store.publish(work, record)


@pytest.fixture
def home(tiny_moe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A home with a deployment, its checkpoint, and the tokens it was gated with."""
    home = Home(tmp_path / "home")
    monkeypatch.setenv("MOESTRO_HOME", str(home.path))
    train_bpe(["while True: pass"] * 4, 300).save_pretrained(tmp_path / "tokenizer")

    def checkpoint(out: Path) -> None:
        save_model(tiny_moe("mixtral"), out, tokenizer_from=tmp_path / "tokenizer", origins=[["seed"] * 6] * 2)

    def tokens(out: Path) -> None:
        for split in ("train", "held_out"):
            np.save(out / f"{split}.npy", np.random.default_rng(0).integers(0, 300, 500).astype(np.uint16))
            np.save(out / f"{split}_documents.npy", np.zeros(1, np.int64))

    inputs = {"model": publish(home, "rl", checkpoint), "tokens/code": publish(home, "tokens", tokens)}
    publish(home, "deploy", lambda out: (out / "deployment.json").write_text("{}"), inputs)
    return home


def profile(tmp_path: Path, **fields: Any) -> str:
    path = tmp_path / "profile.yaml"
    known = {"name": "calm", "method": "suppress", "experts": {0: [1]}, "gate": GATE} | fields
    path.write_text(yaml.safe_dump({name: value for name, value in known.items() if value is not None}))
    return str(path)


def run(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exception is None, result.exception
    told: dict[str, Any] = json.loads(result.stdout)
    return told


def mistake(*arguments: str) -> MoestroError:
    result: Any = CliRunner().invoke(app, list(arguments))
    assert isinstance(result.exception, MoestroError), result.exception
    return result.exception


def test_a_deployments_profile_is_published_shown_and_served(home: Home, tmp_path: Path) -> None:
    told = run("steer", "deploy", "--config", profile(tmp_path))
    assert told["result"]["experts"] == {"0": [1]}
    assert set(told["result"]["loss_increase"]) == {"code"}
    made = Profile.read(Path(told["path"]))
    checkpoint = run("show", "rl")["record"]["fingerprint"]
    assert made.checkpoint.fingerprint == checkpoint
    shown = run("show", "steer")
    assert shown["record"]["fingerprint"] == told["fingerprint"]
    assert [row["stage"] for row in run("show", "artifacts", "--stage", "steer")["artifacts"]] == ["steer"]
    served = Deployment("a", "1", "d" * 64, Input(stage="rl", fingerprint=checkpoint), "float32", 64, 0)
    (found,) = Steering(home.store).published(served.checkpoint.fingerprint)
    assert (found.name, found.fingerprint) == ("calm", told["fingerprint"])


def test_a_checkpoint_is_steered_with_tokens_that_are_named(home: Home, tmp_path: Path) -> None:
    told = run("steer", "rl", "--config", profile(tmp_path), "--tokens", "prose=tokens")
    assert set(told["result"]["loss_increase"]) == {"prose"}
    result = CliRunner().invoke(app, ["steer", "rl", "--config", profile(tmp_path), "--tokens", "prose=tokens"])
    assert "calm  suppress on 1 experts" in result.stdout


def test_the_stage_works_on_folders_too(home: Home, tmp_path: Path) -> None:
    paths = {stage: run("show", stage)["path"] for stage in ("rl", "tokens")}
    inputs = ("--input", f"model={paths['rl']}", "--input", f"tokens/code={paths['tokens']}")
    out = tmp_path / "out"
    run("stage", "steer", "--config", profile(tmp_path, method="contrast", experts=None), "--out", str(out), *inputs)
    assert Profile.read(out).parameters == {"alpha": 0.1, "beta": 0.5, "weak_rank": 3}


def test_mistakes_are_told(home: Home, tmp_path: Path) -> None:
    config = profile(tmp_path)
    assert isinstance(mistake("steer", "nothing", "--config", config), ArtifactError)
    assert "DOMAIN=ARTIFACT" in mistake("steer", "rl", "--config", config, "--tokens", "tokens").message
    assert "no tokens" in mistake("steer", "rl", "--config", config).message
    strict = profile(tmp_path, gate=GATE | {"max_loss_increase": 0.0}, method="contrast", beta=5, experts=None)
    error = mistake("steer", "deploy", "--config", strict)
    assert isinstance(error, GateError)
    assert re.search(r"code by \d+\.\d+ nats per token \(at most 0\)", error.message), error.message
    assert isinstance(mistake("steer", "rl", "--config", profile(tmp_path, method="erase")), ConfigError)


def test_the_documented_profile_is_one() -> None:
    (example,) = re.findall(r"```yaml\n(.+?)```", DOCS.read_text(), re.DOTALL)
    config = validate(AnyProfile, yaml.safe_load(example), where="docs")  # type: ignore[arg-type]
    assert isinstance(config, SuppressProfile)
    assert isinstance(config.select, PromptContrast)
