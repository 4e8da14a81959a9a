"""Commands over a home's records: tables for people, one JSON document with --json, readable errors."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, Group
from typer.testing import CliRunner

from moestro.config import LifecycleConfig, validate
from moestro.errors import BusyError, ConfigError, MoestroError
from moestro_flows.home import Home
from moestro_services.catalog import Catalog
from moestro_services.cli.app import COMMANDS, app
from moestro_services.cli.run import _render
from moestro_services.dashboards import Ports, dashboards
from moestro_services.gateway.assembly import Policy
from moestro_services.gateway.listening import listen


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "140"})
    assert result.exception is None, result.exception
    assert result.exit_code == 0
    return result.stdout


def moestro(*arguments: str, home: Path, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moestro_services.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        env=os.environ | {"MOESTRO_HOME": str(home)},
    )


def test_show_lists_runs_steps_and_artifacts(built_home: Home) -> None:
    assert "20260102-030400-abcd" in run("show")
    steps = run("show", "latest")
    assert all(step.name in steps for step in Catalog(built_home).run().steps)
    assert "own expert code 1.40x" in " ".join(steps.split())
    assert run("show", "artifacts").count("evaluate") == 5
    assert "profile" not in run("show", "artifacts", "--stage", "seed")
    lineage = run("show", "deploy")
    assert "branches/prose: branch" in lineage
    assert lineage.count("(above)") == 4


def test_show_json_is_one_document(built_home: Home) -> None:
    assert json.loads(run("show", "--json"))["runs"][0]["steps"] == 21
    steps = json.loads(run("show", "small", "--json"))["steps"]
    assert next(step for step in steps if step["name"] == "rl")["result"]["reward_last"] == 0.45
    artifact = json.loads(run("show", "mix", "--json"))
    assert artifact["record"]["stage"] == "mix"
    assert artifact == json.loads(run("show", artifact["record"]["fingerprint"][:12], "--json"))
    assert artifact == json.loads(run("show", artifact["path"], "--json"))
    assert {item["stage"] for item in artifact["used_by"]} == {"tune", "evaluate", "profile"}


def test_experts_by_stage_and_by_layer(built_home: Home) -> None:
    found = json.loads(run("experts", "mix", "--json"))
    assert found["checkpoint"]["stage"] == "mix"
    assert [expert["origin"] for expert in found["experts"]] == ["code", "prose", "seed"] * 2
    assert json.loads(run("experts", "mix", "--layer", "1", "--json"))["experts"] == found["experts"][3:]
    table = run("experts", "mix")
    assert "80.0%" in table
    assert "without any preference it is 67%" in " ".join(table.split())


def test_a_deployments_experts_are_its_checkpoints(built_home: Home) -> None:
    deployed = json.loads(run("experts", "deploy", "--json"))
    assert deployed["experts"] == json.loads(run("experts", "compress", "--json"))["experts"]


def test_index_rebuild_counts(built_home: Home) -> None:
    counted = json.loads(run("index", "rebuild", "--json"))
    assert (counted["artifacts"], counted["runs"]) == (21, 1)
    assert (built_home.path / "registry.db").exists()


def test_an_index_in_a_home_that_cannot_be_made_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOESTRO_HOME", str(tmp_path / "file"))
    result: Any = CliRunner().invoke(app, ["index", "rebuild"])
    assert isinstance(result.exception, ConfigError)


def test_a_port_in_use_is_named_with_its_option_before_anything_starts(built_home: Home) -> None:
    said: list[str] = []
    with listen("127.0.0.1", 0) as taken:
        ports = Ports(gateway=0, mlflow=0, prefect=taken.getsockname()[1])
        with pytest.raises(BusyError, match="--prefect-port"):
            dashboards(built_home, ports, model=False, policy=Policy(keys=None), say=said.append).__enter__()
    assert said == []


def test_a_runs_summary_shows_whatever_the_model_answered(built_home: Home) -> None:
    run = Catalog(built_home).run()
    config = validate(LifecycleConfig, run.config, where="test")
    row = {"step": "rl", "status": "completed", "seconds": 1.0, "figures": "a [/b]", "size_mb": 1.0, "artifact": "rl/1"}
    answer = {"prompt": "[1] + [/x]", "completion": "[/INST] [bold]", "endpoint": "http://127.0.0.1:1/v1/completions"}
    console = Console(width=140)
    with console.capture() as shown:
        console.print(Group(*_render(config, run, [row], answer)))
    assert "'[1] + [/x]' -> '[/INST] [bold]'" in shown.get()
    assert "a [/b]" in shown.get()


def test_config_schema_is_the_configs(tmp_path: Path) -> None:
    schema = json.loads(run("config", "schema"))
    assert set(schema["properties"]) == set(LifecycleConfig.model_fields)
    assert schema["properties"]["name"]["description"].startswith("Name of the lifecycle")
    run("config", "schema", "--out", str(tmp_path / "schema.json"))
    assert json.loads((tmp_path / "schema.json").read_text()) == schema


def test_report_is_written(built_home: Home, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    told = json.loads(run("report", "--out", str(out), "--json"))
    assert told == {"run": "20260102-030400-abcd", "file": str(out), "size": out.stat().st_size}


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        (["show", "ffffffff"], "ArtifactError", "No artifact 'ffffffff'"),
        (["show", "artifacts", "--stage", "mixx"], "InputError", "no stage 'mixx'"),
        (["experts", "seed"], "ArtifactError", "has no profile"),
        (["report", "nothing"], "InputError", "No run 'nothing'"),
        (["report", "--out", "/proc/nowhere/report.html"], "ConfigError", "cannot be written"),
        (["serve", "mix", "--no-auth", "--port", "0"], "ArtifactError", "is not a deployment"),
        (["serve", "--host", "0.0.0.0"], "ConfigError", "no API key"),
        (["serve"], "ConfigError", "no API key"),
    ],
)
def test_mistakes_are_moestro_errors(built_home: Home, arguments: list[str], kind: str, words: str) -> None:
    result: Any = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, MoestroError)
    assert type(result.exception).__name__ == kind
    assert words in result.exception.message


def test_an_error_is_one_line_and_exit_code_2(built_home: Home) -> None:
    done = moestro("experts", "seed", home=built_home.path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: seed ")
    assert len(done.stderr.splitlines()) == 1


def test_an_error_with_json_is_a_document(built_home: Home) -> None:
    done = moestro("experts", "seed", "--json", home=built_home.path)
    assert (done.returncode, done.stderr) == (2, "")
    error = json.loads(done.stdout)["error"]
    assert error["kind"] == "ArtifactError"
    assert "has no profile" in error["message"]
    assert error["hint"]


def test_an_unknown_option_is_explained(tmp_path: Path) -> None:
    done = moestro("show", "--nothing", home=tmp_path)
    assert done.returncode == 2
    assert "No such option" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "--nothing"], "No such option: --nothing"),
        (["eval"], "Missing argument 'checkpoint'"),
        (["experts", "mix", "--layer", "first"], "Invalid value for '--layer'"),
        (["nothing"], "No such command 'nothing'"),
    ],
)
def test_wrong_usage_with_json_is_a_document(tmp_path: Path, arguments: list[str], words: str) -> None:
    done = moestro(*arguments, "--json", home=tmp_path)
    assert (done.returncode, done.stderr) == (2, "")
    error = json.loads(done.stdout)["error"]
    assert error["kind"] == "UsageError"
    assert words in error["message"]
    assert error["hint"]


def test_other_exit_codes_are_the_same_with_json(built_home: Home) -> None:
    assert moestro("show", "--json", home=built_home.path).returncode == 0
    done = moestro("show", "--json", "--help", home=built_home.path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage" in done.stdout


def test_an_empty_home_says_what_to_do(tmp_path: Path) -> None:
    done = moestro("show", home=tmp_path / "new")
    assert done.returncode == 0
    assert "moestro run CONFIG.yaml" in " ".join(done.stdout.split())
    assert not (tmp_path / "new").exists()
    assert moestro("report", home=tmp_path / "new").returncode == 2


def test_help_lists_every_command_quickly(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = moestro("--help", home=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert all(name in done.stdout for name, _ in COMMANDS)
    # processor time: the wall clock depends on what else runs here
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5


def test_starting_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys, moestro_services.cli; "
        "print([n for n in ('torch', 'vllm', 'ray', 'prefect', 'mlflow', 'sqlalchemy', 'matplotlib', 'transformers',"
        " 'fastapi', 'uvicorn', 'numpy') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]"
