"""`moestro append` and `moestro remove`, the stages behind them by `moestro stage`, and what a home shows of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig
from typer.testing import CliRunner

from moestro.artifacts import Artifact
from moestro.config import AppendConfig, MeanRow, RemoveConfig, Resources
from moestro.data.tokenizer import train_bpe
from moestro.errors import ConfigError, InputError, MoestroError
from moestro.execution import Step, run_step
from moestro.models.checkpoint import save_model
from moestro.models.files import read_origins
from moestro_flows.home import Home
from moestro_flows.summary import figures
from moestro_services.cli.app import app


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, dense_fields: dict[str, Any]) -> Path:
    """`moe` of code, docs and the seed, the branch `law`, and `tokens` of law and code."""
    root = tmp_path_factory.mktemp("models")
    train_bpe(["while True: pass"] * 4, 300).save_pretrained(root / "tokenizer")
    small = dense_fields | {"initializer_range": 0.02}
    torch.manual_seed(0)
    moe = AutoModelForCausalLM.from_config(MixtralConfig(**small, num_local_experts=3, num_experts_per_tok=2))
    save_model(moe, root / "moe", tokenizer_from=root / "tokenizer", origins=[["code", "docs", "seed"]] * 2)
    law = AutoModelForCausalLM.from_config(LlamaConfig(**small, rms_norm_eps=1e-5))
    law.config.rope_parameters = moe.config.rope_parameters
    law.config.rms_norm_eps = moe.config.rms_norm_eps
    save_model(law, root / "law", tokenizer_from=root / "tokenizer")
    for start, name in enumerate(("law", "code")):
        (root / "tokens" / name).mkdir(parents=True)
        np.save(root / "tokens" / name / "train.npy", np.arange(start, 600, 2, dtype=np.uint16) % 320)
        np.save(root / "tokens" / name / "train_documents.npy", np.zeros(1, dtype=np.int64))
    return root


def run(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exception is None, result.exception
    told: dict[str, Any] = json.loads(result.stdout)
    return told


def mistake(*arguments: str) -> MoestroError:
    result: Any = CliRunner().invoke(app, list(arguments))
    assert isinstance(result.exception, MoestroError), result.exception
    return result.exception


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_append_and_remove(models: Path, tmp_path: Path) -> None:
    more, back = str(tmp_path / "more"), str(tmp_path / "back")
    given = [part for name in ("law", "code") for part in ("--tokens", f"{name}={models / 'tokens' / name}")]
    told = run("append", str(models / "moe"), "--branch", f"law={models / 'law'}", *given, "--out", more)
    assert (told["stage"], told["out"], told["result"]["router"]) == ("append", more, "centroid")
    assert read_origins(tmp_path / "more") == [["code", "docs", "seed", "law"]] * 2
    told = run("remove", more, "--expert", "law", "--out", back)
    assert told["result"]["expert_ids"] == [[0, 1, 2, None]] * 2
    before, after = weights(models / "moe"), weights(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "more"]
    assert Artifact.open(tmp_path / "back").stage == "remove"


def test_the_commands_do_what_the_stages_do(models: Path, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("{domain: law, router: {type: mean}}")
    (tmp_path / "r.yaml").write_text("layers: {0: [0], 1: [docs]}")
    model, branch = f"model={models / 'moe'}", f"branch={models / 'law'}"
    appended = ["--config", str(tmp_path / "a.yaml"), "--input", model, "--input", branch, "--out"]
    staged = run("stage", "append", *appended, str(tmp_path / "a1"))
    short = ["--branch", f"law={models / 'law'}", "--router", "mean", "--out", str(tmp_path / "a2")]
    assert run("append", str(models / "moe"), *short)["fingerprint"] == staged["fingerprint"]
    removed = ["--config", str(tmp_path / "r.yaml"), "--input", model, "--out", str(tmp_path / "r1")]
    staged = run("stage", "remove", *removed)
    assert staged["result"]["expert_ids"] == [[None, 0, 1], [0, None, 1]]
    short = ["--expert", "0:0", "--expert", "1:docs", "--out", str(tmp_path / "r2")]
    assert run("remove", str(models / "moe"), *short)["fingerprint"] == staged["fingerprint"]


def test_tokens_are_a_role_of_append(models: Path, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("domain: law")
    inputs = [f"model={models / 'moe'}", f"branch={models / 'law'}"]
    inputs += [f"tokens/{name}={models / 'tokens' / name}" for name in ("law", "code")]
    given = [part for item in inputs for part in ("--input", item)]
    told = run("stage", "append", "--config", str(tmp_path / "a.yaml"), *given, "--out", str(tmp_path / "out"))
    assert told["result"]["num_experts"] == 4
    without = mistake("stage", "append", "--config", str(tmp_path / "a.yaml"), *given[:4], "--out", str(tmp_path / "b"))
    assert "No tokens of law" in without.message


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        (["append", "{moe}", "--branch", "{law}"], ConfigError, "expected NAME=FOLDER"),
        (["append", "{moe}", "--branch", "law={law}", "--tokens", "law"], ConfigError, "expected DOMAIN=FOLDER"),
        (["append", "{moe}", "--branch", "seed={law}"], ConfigError, "names an expert that is no domain's"),
        (["append", "{moe}", "--branch", "law={law}", "--router", "best"], ConfigError, "router"),
        (["append", "{moe}", "--branch", "law={law}"], InputError, "No tokens of law"),
        (["append", "{moe}", "--branch", "code={law}"], InputError, "has an expert made from 'code' already"),
        (["append", "{law}", "--branch", "law={law}"], InputError, "is a dense model"),
        (["append", "{moe}", "--branch", "law=nowhere"], InputError, "no such file"),
        (["remove", "{moe}", "--expert", "law"], InputError, "no expert made from 'law'"),
        (["remove", "{moe}", "--expert", "x:0"], ConfigError, "LAYER:NUMBER"),
        (["remove", "{moe}", "--expert", "0:"], ConfigError, "LAYER:NUMBER"),
        (["remove", "{moe}", "--expert", "0:1"], InputError, "different numbers of experts"),
        (["remove", "{moe}", "--expert", "0", "--expert", "1"], InputError, "every token chooses 2"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(
    models: Path, tmp_path: Path, arguments: list[str], kind: type[MoestroError], words: str
) -> None:
    filled = [item.format(moe=models / "moe", law=models / "law") for item in arguments]
    error = mistake(*filled, "--out", str(tmp_path / "out"))
    assert type(error) is kind
    assert words in error.message
    assert not list(tmp_path.iterdir())


def test_a_lifecycle_has_no_section_for_them(tmp_path: Path) -> None:
    config = Path(__file__).parents[1] / "e2e" / "tiny.yaml"
    error = mistake("stage", "remove", "--config", str(config), "--out", str(tmp_path / "out"))
    assert "a lifecycle has no stage remove" in error.message


def test_a_home_shows_and_indexes_them(built_home: Home, models: Path) -> None:
    inputs = {"model": Artifact.open(models / "moe"), "branch": Artifact.open(models / "law"), "tokens": {}}
    config = AppendConfig(domain="law", router=MeanRow())
    more = run_step(built_home.store, Step("append", config, inputs), resources=Resources())
    step = Step("remove", RemoveConfig(experts=("code", 1)), {"model": more})
    less = run_step(built_home.store, step, resources=Resources())
    assert figures(more.record).startswith("expert law; of 4; parameters ")
    assert figures(less.record).startswith("without 1 code; leaves 2; parameters ")
    shown = run("show", "remove")
    assert [item["stage"] for item in shown["lineage"]] == ["remove", "append", "files", "files"]
    assert run("index", "rebuild")["artifacts"] == 23
    report = built_home.path / "report.html"
    run("report", "--out", str(report))
    assert report.stat().st_size > 10_000
