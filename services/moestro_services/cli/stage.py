"""`moestro stage`: one stage alone on given checkpoints, and `moestro eval`: a checkpoint measured."""

import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.text import Text

from moestro.artifacts import Artifact, ArtifactStore
from moestro.config import DOMAIN_NAME, Config, EvaluateConfig, Resources, read_yaml, validate
from moestro.errors import BusyError, ConfigError, InputError
from moestro_services.cli.output import Json, emit, others_on_stderr
from moestro_services.cli.progress import LiveProgress

DOMAIN_NAME_HINT = "Small letters, digits, dashes and underscores, 32 at most, the first a letter."


def stage(
    name: Annotated[
        str,
        typer.Argument(help="corpus, seed, tokens, branch, mix, append, remove, tune, rl, compress, evaluate, ..."),
    ],
    config: Annotated[Path, typer.Option("--config", help="YAML file with the stage's config, or a whole lifecycle.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to make; must not exist.")],
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", help="ROLE=FOLDER, e.g. seed=runs/seed or branches/code=runs/code; repeat for each."),
    ] = None,
    domain: Annotated[
        str, typer.Option("--domain", help="The domain, where a lifecycle has one config per domain.")
    ] = "",
    cpus: Annotated[int | None, typer.Option("--cpus", help="Cores to use.", min=1)] = None,
    json: Json = False,
) -> None:
    """Run one stage alone. Inputs are artifacts of Moestro's or any Hugging Face directory."""
    run_and_tell(name, stage_config(name, config, domain), inputs or [], out, cpus=cpus, json=json)


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint: a Hugging Face directory.")],
    tokens: Annotated[list[str], typer.Option("--tokens", help="DOMAIN=FOLDER of a tokens artifact; repeat for each.")],
    task: Annotated[str, typer.Option("--task", help="A reasoning-gym task to answer as well.")] = "",
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Held-out tokens per domain.")] = 32_768,
    json: Json = False,
) -> None:
    """Measure a checkpoint: held-out loss per domain, and accuracy on a task."""
    for item in tokens:
        if not all(item.partition("=")):
            raise ConfigError(f"--tokens {item}: expected DOMAIN=FOLDER.")
    fields: dict[str, Any] = {"max_tokens": max_tokens, "task": {"name": task} if task else None}
    config = validate(EvaluateConfig, fields, where="moestro eval")
    given = stage_inputs("evaluate", [f"model={checkpoint}", *(f"tokens/{item}" for item in tokens)])
    with TemporaryDirectory() as folder:
        result = _run_alone("evaluate", config, given, Path(folder) / "evaluation", None).record.result
    emit(result, lambda: Group(*_render({"result": result})), json=json)


def run_and_tell(
    name: str, config: Config, inputs: list[str], out: Path, *, cpus: int | None = None, json: bool = False
) -> None:
    """Run one stage on `inputs` (each ROLE=FOLDER) into the new folder `out`, and print its figures."""
    if out.exists():
        raise InputError(f"{out} exists.", hint="Name a folder that does not.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=out.parent).close()
    except OSError as error:
        raise ConfigError(f"{out} cannot be made ({error.strerror}).") from None
    record = _run_alone(name, config, stage_inputs(name, inputs), out, cpus).record
    data = {"stage": name, "out": str(out), "fingerprint": record.fingerprint, "result": record.result}
    emit(data, lambda: Group(*_render(data)), json=json)


def _run_alone(name: str, config: Config, inputs: dict[str, Any], out: Path, cpus: int | None) -> Artifact:
    """Run in a store of its own beside `out`, and move the result to `out`. The store stays only if an interrupted
    attempt left something in it to resume from."""
    store = ArtifactStore(out.parent / f".{out.name}.moestro")
    with _tidied(store.root):
        artifact = run_in(store, name, config, inputs, cpus=cpus)
        artifact.path.rename(out)
    return replace(artifact, path=out)


def run_in(store: ArtifactStore, name: str, config: Config, inputs: dict[str, Any], *, cpus: int | None) -> Artifact:
    """Run one stage, or find its artifact, in `store`; what it reports is shown on standard error."""
    from moestro.execution import Step, run_step

    listener = LiveProgress(Console(stderr=True))
    reporter = _Alone(listener, name)
    step = Step(name, config, inputs)
    with others_on_stderr(), listener.listening():
        listener.started(name)
        return run_step(store, step, resources=Resources(cpus=cpus), reporter=reporter, extras=_extras(name))


def _extras(name: str) -> dict[str, Any]:
    """What the stage is handed beside its inputs."""
    from moestro.stages import STAGES

    if not STAGES[name].needs_engine:
        return {}
    from moestro.inference.engine import VllmEngine

    return {"engine": VllmEngine}


@contextmanager
def _tidied(store: Path) -> Iterator[None]:
    """Remove the store in the end, unless another process works in it or it holds something to resume from."""
    try:
        yield
    except BusyError:
        raise
    except BaseException:
        if not any(path.is_file() for path in [*store.glob("work/*/*/scratch/**/*"), *store.glob("artifacts/**/*")]):
            shutil.rmtree(store, ignore_errors=True)
        raise
    shutil.rmtree(store)


class _Alone:
    """Passes what a stage reports on."""

    def __init__(self, listener: LiveProgress, name: str) -> None:
        self.listener = listener
        self.name = name

    def progress(self, done: int, total: int, message: str = "") -> None:
        self.listener.progress(self.name, done, total, message)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.listener.metrics(self.name, values, step)


def stage_config(name: str, path: Path, domain: str = "") -> Config:
    """The stage's config from its own file, with or without its name above it, or out of a lifecycle's.

    Raises `ConfigError` if it is in neither.
    """
    from moestro.config import LifecycleConfig
    from moestro.stages import STAGES

    if name not in STAGES:
        raise ConfigError(f"There is no stage {name!r}.", hint=f"Stages are {', '.join(STAGES)}.")
    data = read_yaml(path)
    if not isinstance(data, dict) or "domains" not in (data.get("data") or {}):
        section = data[name] if isinstance(data, dict) and data.keys() == {name} else data
        return validate(STAGES[name].config, section, where=str(path))
    lifecycle = validate(LifecycleConfig, data, where=str(path))
    configs: Mapping[str, Config] = {}
    if name == "corpus":
        configs = lifecycle.data.corpus_configs()
    elif name == "branch":
        configs = lifecycle.branch_configs()
    elif name not in LifecycleConfig.model_fields:
        raise ConfigError(f"{path}: a lifecycle has no stage {name}.", hint="Give the stage a config file of its own.")
    else:
        found: Config | None = getattr(lifecycle, name)
        if found is None:
            raise ConfigError(f"{path} leaves out the stage {name}.", hint=f"Add a section {name}:")
        return found
    if domain not in configs:
        raise ConfigError(f"{name} needs --domain, one of {', '.join(configs)}.")
    return configs[domain]


def stage_inputs(name: str, pairs: list[str]) -> dict[str, Any]:
    """`role=folder` pairs as the stage's inputs; roles with a slash are collected into mappings.

    Raises `ConfigError` for a pair that the stage has no use for and for one that is missing, `InputError` for a folder
    that is not there, `ArtifactError` for one that was changed.
    """
    from moestro.stages import STAGES

    stage, folders = STAGES[name], {}
    for pair in pairs:
        role, equals, folder = pair.partition("=")
        top, slash, key = role.partition("/")
        if not equals or not folder or top not in stage.inputs or bool(slash and key) != (top in stage.per_domain):
            wanted = ", ".join(_roles(name)) or "none"
            raise ConfigError(f"{pair}: expected ROLE=FOLDER with a role of {name}: {wanted}.")
        if slash and not re.fullmatch(DOMAIN_NAME, key):
            raise ConfigError(f"{pair}: {key!r} is no name of a domain.", hint=DOMAIN_NAME_HINT)
        if role in folders:
            raise ConfigError(f"--input {role} is given twice.", hint="Each role takes one folder.")
        folders[role] = Path(folder)
        if not folders[role].exists():
            raise InputError(f"{folder}: no such file or directory.")
    given = {role.partition("/")[0] for role in folders} | set(stage.optional)
    missing = [role for role in _roles(name) if role.partition("/")[0] not in given]
    if missing:
        raise ConfigError(f"{name} needs {' '.join(f'--input {role}=FOLDER' for role in missing)}.")
    with ThreadPoolExecutor(max_workers=1) as imports:
        imports.submit(stage.load)  # takes as long as reading some gigabytes, so both are done at once
        opened = {role: Artifact.open(folder) for role, folder in folders.items()}
    inputs: dict[str, Any] = {role: {} for role in stage.per_domain}
    for role, artifact in opened.items():
        top, slash, key = role.partition("/")
        if slash:
            inputs[top][key] = artifact
        else:
            inputs[top] = artifact
    return inputs


def _roles(name: str) -> list[str]:
    """The roles of a stage's inputs as they are given: `seed`, `branches/DOMAIN`."""
    from moestro.stages import STAGES

    stage = STAGES[name]
    return [f"{role}/DOMAIN" if role in stage.per_domain else role for role in stage.inputs]


def _render(data: dict[str, Any]) -> Iterator[Any]:
    for key, value in {**data, **data.get("result", {})}.items():
        if key != "result":
            yield from _lines(key, value, "")


def _lines(key: str, value: Any, indent: str) -> Iterator[Text]:
    """A figure as a line, a mapping as a line for each entry below it, and a list whose entries are alike as one."""
    if isinstance(value, Mapping) and value:
        yield Text(f"{indent}{key}")
        for name, item in value.items():
            yield from _lines(str(name), item, f"{indent}  ")
        return
    if isinstance(value, list) and value and isinstance(value[0], list) and all(item == value[0] for item in value):
        key, value = f"{key} (each of {len(value)})", value[0]
    shown = ", ".join("-" if item in (None, "") else str(item) for item in value) if isinstance(value, list) else value
    yield Text(f"{indent}{key:<24} {shown}")
