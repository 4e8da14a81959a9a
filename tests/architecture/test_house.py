"""The house's walls: layers, folders that must stay plain, imports that must stay cheap, sizes, names."""

import ast
import importlib
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import moestro
import moestro.artifacts
import moestro.config
from moestro.config import Config, LifecycleConfig, load_lifecycle
from moestro.stages import STAGES

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("platform/moestro", "flows/moestro_flows", "kernels/moestro_kernels", "services/moestro_services")
PLAIN_FOLDERS = ("platform", "flows", "kernels", "services", "infra", "docs", "examples")
HEAVY = {"torch", "vllm", "ray", "prefect", "mlflow", "sqlalchemy", "transformers", "numpy"}
MAX_MODULE_LINES = 300
MAX_FUNCTION_LINES = 50
TEXT = {".py", ".md", ".yaml", ".yml", ".toml", ".json", ".svg", ".sh", ".txt", ".lock", ".html", ".css", ".js", ""}


def modules() -> Iterator[Path]:
    for package in PACKAGES:
        yield from sorted((ROOT / package).rglob("*.py"))


def test_layers_hold() -> None:
    script = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_source_roots_are_no_packages() -> None:
    """An `__init__.py` there would shadow the standard library's `platform` or the package `kernels` on PyPI."""
    assert [folder for folder in PLAIN_FOLDERS if (ROOT / folder / "__init__.py").exists()] == []
    assert list((ROOT / "tests").rglob("__init__.py")) == []


@pytest.mark.parametrize("module", ["moestro", "moestro.config", "moestro.errors", "moestro.stages"])
def test_configs_load_without_the_heavy_libraries(module: str) -> None:
    script = (
        f"import sys, json, {module}; print(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert HEAVY & set(json.loads(done.stdout)) == set()


def test_modules_stay_small() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in modules()}
    assert {name: length for name, length in lengths.items() if length > MAX_MODULE_LINES} == {}


def test_functions_stay_small() -> None:
    long = {
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    }
    assert long == {}


def test_every_module_says_what_it_is() -> None:
    bare = [
        str(path.relative_to(ROOT))
        for path in modules()
        if (text := path.read_text()).strip() and ast.get_docstring(ast.parse(text)) is None
    ]
    assert bare == []


def test_drawers_have_no_place() -> None:
    drawers = {"utils", "common", "core", "helpers", "manager"}
    assert [str(path) for path in modules() if drawers & {path.stem, *path.relative_to(ROOT).parts}] == []


def configs(kind: type[Config] = Config) -> Iterator[type[Config]]:
    for child in kind.__subclasses__():
        if child.__module__.startswith("moestro"):
            yield child
        yield from configs(child)


def test_every_field_of_every_config_is_described() -> None:
    found = list(configs())
    assert LifecycleConfig in found
    silent = [
        f"{config.__name__}.{name}"
        for config in found
        for name, field in config.model_fields.items()
        if not field.description and name != "type"
    ]
    assert silent == []


def test_the_schema_for_editors_describes_the_whole_lifecycle() -> None:
    schema = LifecycleConfig.model_json_schema()
    assert schema["properties"]["mix"]["description"]
    assert not schema["additionalProperties"]


@pytest.mark.parametrize(
    "package", [pytest.param("moestro", marks=pytest.mark.slow), "moestro.config", "moestro.artifacts"]
)
def test_exported_names_exist_and_are_sorted(package: str) -> None:
    module = importlib.import_module(package)
    assert sorted(module.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name)) == module.__all__
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_every_config_class_is_exported() -> None:
    defined = {config.__name__ for config in configs() if config.__module__.startswith("moestro.config")}
    assert defined - set(moestro.config.__all__) == set()


def test_every_stage_is_a_function_of_the_package() -> None:
    """`rl` is the name of its package as well, so its function is `moestro.rl.rl`."""
    assert set(moestro.__all__) == set(STAGES) - {"rl"}


EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


def test_the_examples_are_there() -> None:
    assert {"quickstart.yaml", "smollm2.yaml"} <= {path.name for path in EXAMPLES}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_validates(path: Path) -> None:
    load_lifecycle(path)


def sources() -> Iterator[Path]:
    """Every text file of the repository; what is made or downloaded lies elsewhere."""
    folders = (*PLAIN_FOLDERS, "tests", ".ci")
    yield from (path for path in ROOT.iterdir() if path.is_file() and path.suffix in TEXT)
    for folder in folders:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix in TEXT and "__pycache__" not in path.parts:
                yield path


def test_no_path_of_anybodys_machine() -> None:
    home = re.compile(r"(?<![\w.$}])/(?:home|Users|root)/\w")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sources()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if home.search(line)
    ]
    assert found == []


def test_test_files_have_unique_names() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


@pytest.mark.slow
def test_the_wheel_holds_the_four_packages_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {Path(package).name for package in PACKAGES}
    packed = {name for name in names if name.endswith(".py")}
    assert packed == {str(path.relative_to(ROOT / path.relative_to(ROOT).parts[0])) for path in modules()}
