"""The files under infra/ parse, name things that exist, and hold no address or password of their own."""

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
YAML_FILES = sorted([*INFRA.rglob("*.yaml"), *INFRA.rglob("*.yml"), ROOT / "mkdocs.yml"])


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((INFRA / name).read_text()))


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.name)
def test_yaml_parses(path: Path) -> None:
    assert all(isinstance(document, dict) for document in yaml.safe_load_all(path.read_text()))


@pytest.mark.parametrize("path", sorted(INFRA.rglob("*.sh")), ids=lambda path: path.name)
def test_shell_scripts_parse_and_can_be_run(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert os.access(path, os.X_OK)


@pytest.mark.slow
def test_the_prefect_deployment_is_what_prefect_reads_and_its_flow_takes_its_parameters(tmp_path: Path) -> None:
    script = """
import json, sys
from pathlib import Path
from moestro_flows.home import Home
Home.current().prepare()
from prefect.cli.deploy._models import PrefectYamlModel
from prefect.flows import load_flow_from_entrypoint
import yaml
(deployment,) = PrefectYamlModel.model_validate(yaml.safe_load(Path(sys.argv[1]).read_text())).deployments
flow = load_flow_from_entrypoint(deployment.entrypoint)
print(json.dumps([flow.name, sorted(deployment.parameters), sorted(flow.parameters.properties)]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(INFRA / "prefect.yaml")],
        env=os.environ | {"MOESTRO_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    name, given, taken = json.loads(done.stdout.splitlines()[-1])
    assert name == "lifecycle"
    assert "config_path" in given
    assert set(given) <= set(taken)


def test_the_prefect_deployment_runs_an_example_that_exists() -> None:
    (document,) = documents("prefect.yaml")
    for deployment in document["deployments"]:
        assert (ROOT / deployment["parameters"]["config_path"]).is_file()


def test_compose_services_depend_on_services_and_use_volumes_that_are_declared() -> None:
    (compose,) = documents("compose.yaml")
    services = compose["services"]
    for name, service in services.items():
        assert set(service.get("depends_on", {})) <= set(services), name
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            assert source in compose["volumes"] or source.startswith("$"), name
        assert set(service.get("secrets", [])) <= set(compose.get("secrets", {})), name


def pinned() -> dict[str, str]:
    lines = (INFRA / "requirements.lock").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_what_is_pinned_fits_the_python_that_debian_has() -> None:
    """Nothing wants a later one, and what is needed before a later one is pinned too."""
    debian = "3.11.2"
    unfit, missing = [], []
    for name in pinned():
        found = distribution(name)
        if debian not in SpecifierSet("".join(found.metadata.get_all("Requires-Python") or [])):
            unfit.append(name)
        for requirement in map(Requirement, found.requires or ()):
            marker = requirement.marker
            if marker is None or "python_full_version" not in str(marker):
                continue
            if marker.evaluate({"python_full_version": debian, "extra": ""}) and requirement.name not in pinned():
                missing.append(f"{name} needs {requirement}")
    assert (unfit, missing) == ([], [])


def test_images_follow_the_pinned_versions() -> None:
    pins = pinned()
    (cluster,) = [document for document in documents("raycluster.yaml") if document["kind"] == "RayCluster"]
    assert cluster["spec"]["rayVersion"] == pins["ray"]
    torch = re.search(r"torch==([\d.]+)", (INFRA / "Containerfile").read_text())
    assert torch is not None
    assert f'"torch=={torch[1]}"' in (ROOT / "pyproject.toml").read_text()
    assert f"torch=={torch[1]}" in (ROOT / "Makefile").read_text()


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from strings(key)
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)
    elif isinstance(value, str):
        yield value


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.name)
def test_no_password_and_no_address_of_a_machine_stands_in_a_file(path: Path) -> None:
    local = r"(?:localhost|127\.0\.0\.1|0\.0\.0\.0|postgres|prefect|mlflow|gateway|prometheus)"
    for document in yaml.safe_load_all(path.read_text()):
        for address in re.findall(r"://\S+|://.*", "\n".join(strings(document)).replace(":?set it", "")):
            user, _, rest = address[3:].rpartition("@")
            assert re.fullmatch(local, re.split(r"[:/')]", rest)[0]), address
            assert not user or re.fullmatch(r"\w+:\$\{\w+\}", user), address


def test_environment_variables_of_infra_are_ones_that_are_read() -> None:
    """A misspelt MOESTRO_ variable would silently do nothing."""
    from moestro_flows import home

    used = set(re.findall(r"\bMOESTRO_[A-Z_]+\b", "".join(path.read_text() for path in YAML_FILES)))
    own_to_infra = {"MOESTRO_IMAGE", "MOESTRO_CONFIGS"}
    assert {name for name in used - own_to_infra if name not in inspect.getsource(home)} == set()
