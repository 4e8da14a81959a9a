"""`moestro run` and `moestro plan`: a lifecycle, or what running it would do."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from moestro.artifacts import Artifact, LifecycleRun, read_runs
from moestro.config import LifecycleConfig, load_lifecycle
from moestro.errors import ConfigError
from moestro_flows.home import Home
from moestro_services.cli.json_events import JsonEvents
from moestro_services.cli.output import Json, emit, others_on_stderr, own_command
from moestro_services.cli.progress import LiveProgress

STYLES = {"reuse": "dim", "damaged": "bold red"}
"""Of a plan's rows, by action."""

Config = Annotated[Path, typer.Argument(help="The lifecycle's YAML file.", show_default=False)]


def run(
    config: Config,
    ask: Annotated[
        bool, typer.Option(help="At the end, serve the model and ask it the config's sample prompt.")
    ] = True,
    json: Json = False,
    events: Annotated[
        Path | None, typer.Option("--events", help="With --json: the file that what happens is written to.")
    ] = None,
) -> None:
    """Run a lifecycle: what is there already is reused, what was interrupted resumes.

    With --json standard error (or the file --events) says what happens while it does, one JSON object a line.
    """
    from moestro_flows.server import reach

    loaded = load_lifecycle(config)
    home = Home.current()
    home.prepare()
    reach(home)
    console = Console(stderr=True)
    with event_stream(events) as stream:
        progress = JsonEvents(stream) if json else LiveProgress(console)
        with others_on_stderr(), _terminate_like_interrupt(), progress.listening():
            from moestro_flows.stages import run_lifecycle

            lifecycle_run = _record(home, run_lifecycle(config, loaded.name))
            answer = _ask(home, loaded, lifecycle_run, None if json else console) if ask and loaded.deploy else None
    from moestro_flows.summary import rows

    table = rows(lifecycle_run, home.store)
    data = {"run": lifecycle_run.id, "seconds": round(lifecycle_run.seconds, 1), "steps": table, "answer": answer}
    emit(data, lambda: Group(*_render(loaded, lifecycle_run, table, answer)), json=json)


def plan(config: Config, json: Json = False) -> None:
    """Say which steps would run and what they train, which are reused and which are damaged, and why."""
    from moestro_flows.plan import Plan

    steps = Plan.of(load_lifecycle(config), Home.current().store).steps
    rows = [
        {
            "step": step.name,
            "action": step.action,
            "work": step.work,
            "reason": step.reason,
            "artifact": f"{step.stage}/{step.fingerprint[:16]}",
        }
        for step in steps
    ]
    counts = {action: sum(step.action == action for step in steps) for action in ("run", "reuse", "damaged")}
    emit({"steps": rows, **counts}, lambda: Group(*_plan_table(rows)), json=json)


def _record(home: Home, run_id: str) -> LifecycleRun:
    return next(found for found in read_runs(home.runs) if found.id == run_id)


def _ask(home: Home, config: LifecycleConfig, run: LifecycleRun, console: Console | None) -> dict[str, Any] | None:
    """The deployed model's answer to the config's sample prompt, over REST."""
    from moestro_services.gateway.launch import ask, running_gateway

    assert config.deploy is not None
    step = next(step for step in run.steps if step.stage == "deploy")
    if step.reused:
        return None
    artifact = home.store.find("deploy", step.fingerprint)
    assert isinstance(artifact, Artifact)
    if console:
        console.print(f"serving {config.deploy.name} to ask it one question ...", style="dim")
    with running_gateway(home, artifact) as address:
        reply = ask(address, config.deploy.name, config.deploy.sample_prompt, 16)
    return {"prompt": config.deploy.sample_prompt, "completion": reply, "endpoint": f"{address}/v1/completions"}


def _render(
    config: LifecycleConfig, run: LifecycleRun, table: list[dict[str, Any]], answer: dict[str, Any] | None
) -> Iterator[Any]:
    shown = Table(title=f"{run.name}: {run.seconds:.0f} s", title_justify="left", pad_edge=False)
    for column in ("step", "time", "figures", "size", "artifact"):
        shown.add_column(column, justify="right" if column in {"time", "size"} else "left", overflow="fold")
    for row in table:
        time = "reused" if row["status"] == "reused" else f"{row['seconds']:.1f} s"
        shown.add_row(row["step"], time, escape(row["figures"]), f"{row['size_mb']:.1f} MB", row["artifact"])
    yield shown
    if answer:
        yield f"\n[bold]{config.deploy.name if config.deploy else ''}[/bold] over REST ({answer['endpoint']}):"
        yield Text(f"  {answer['prompt']!r} -> {answer['completion']!r}")
    command = own_command()
    yield f"\nreport     {command} report {run.id}"
    yield f"MLflow, Prefect and gateway   {command} ui --no-auth"
    if config.deploy:
        yield f"serve      {command} serve --no-auth"


def _plan_table(rows: list[dict[str, Any]]) -> Iterator[Any]:
    shown = Table(pad_edge=False)
    for column in ("step", "action", "work", "why", "artifact"):
        shown.add_column(column, overflow="fold")
    for row in rows:
        style = STYLES.get(row["action"], "")
        shown.add_row(row["step"], row["action"], row["work"], escape(row["reason"]), row["artifact"], style=style)
    yield shown


@contextmanager
def event_stream(events: Path | None) -> Iterator[TextIO | None]:
    """The file `events`, open to be written at its end; raises `ConfigError` if it cannot be."""
    if events is None:
        yield None
        return
    try:
        stream = events.open("a", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{events} cannot be written ({error.strerror}).") from None
    with stream:
        yield stream


@contextmanager
def _terminate_like_interrupt() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does: in order, with nothing left behind."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
