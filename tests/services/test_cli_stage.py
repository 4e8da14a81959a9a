"""`moestro stage` and `moestro eval`: what is given wrongly is named, and nothing is left behind."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moestro.errors import MoestroError
from moestro_services.cli.app import app
from moestro_services.cli.stage import _render

STAGES = {
    "tune": "training: {steps: 1}",
    "tokens": "{}",
    "evaluate": "{}",
}


def mistake(tmp_path: Path, stage: str, *arguments: str) -> MoestroError:
    config = tmp_path / "config.yaml"
    config.write_text(STAGES[stage])
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    command = ["stage", stage, "--config", str(config), *out, *arguments]
    result: Any = CliRunner().invoke(app, command)
    assert isinstance(result.exception, MoestroError), result.exception
    return result.exception


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (["model={0}", "tokens={0}"], "tokens={0}: expected ROLE=FOLDER with a role of tune: model, tokens/DOMAIN"),
        (["model/code={0}", "tokens/code={0}"], "model/code={0}: expected"),
        (["model={0}", "tokens/={0}"], "tokens/={0}: expected"),
        (["model"], "model: expected"),
        (["seed={0}"], "seed={0}: expected"),
        (["model={0}"], "tune needs --input tokens/DOMAIN=FOLDER."),
        (["tokens/code={0}"], "tune needs --input model=FOLDER."),
        (["model={0}", "model={0}"], "--input model is given twice."),
        (["model={0}", "tokens/../x={0}"], "'../x' is no name of a domain."),
    ],
)
def test_a_wrong_input_is_named_with_the_roles_there_are(tmp_path: Path, inputs: list[str], words: str) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    arguments = [part for item in inputs for part in ("--input", item.format(folder))]
    assert words.format(folder) in mistake(tmp_path, "tune", *arguments).message


def test_a_stage_that_fails_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    error = mistake(tmp_path, "tokens", "--input", f"corpus={folder}", "--input", f"seed={folder}")
    assert "tokenizer" in error.message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "empty"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    out = tmp_path / "config.yaml" / "out"
    assert f"{out} cannot be made" in mistake(tmp_path, "evaluate", *given(tmp_path), "--out", str(out)).message


def given(tmp_path: Path) -> list[str]:
    return ["--input", f"model={tmp_path}", "--input", f"tokens/code={tmp_path}"]


def test_tokens_of_eval_need_a_domain(tmp_path: Path) -> None:
    result: Any = CliRunner().invoke(app, ["eval", str(tmp_path), "--tokens", str(tmp_path)])
    assert result.exception.message == f"--tokens {tmp_path}: expected DOMAIN=FOLDER."


def test_nested_figures_stand_on_lines_of_their_own() -> None:
    data = {"stage": "mix", "result": {"experts": [["code", ""], ["code", ""]], "rest": {"norms": {"method": "mean"}}}}
    lines = [str(line).rstrip() for line in _render(data)]
    assert lines == [
        f"{'stage':<24} mix",
        f"{'experts (each of 2)':<24} code, -",
        "rest",
        "  norms",
        f"    {'method':<24} mean",
    ]
