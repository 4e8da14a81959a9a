"""`moestro show`: runs, one run's steps, artifacts, one artifact and what it was made from, registered models."""

from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.tree import Tree

from moestro.artifacts import LifecycleRun
from moestro.errors import InputError
from moestro.stages import STAGES
from moestro_flows.home import Home
from moestro_flows.summary import figures as key_figures
from moestro_services.catalog import DIGITS, Ancestor, Catalog, Entry
from moestro_services.cli.output import Json, duration, emit, figure, moment, size, table


def show(
    what: Annotated[
        str,
        typer.Argument(
            help="runs | artifacts | models | latest | a run's id or name | an artifact: folder, stage or fingerprint"
        ),
    ] = "runs",
    stage: Annotated[str, typer.Option("--stage", help="Only artifacts of this stage.")] = "",
    json: Json = False,
) -> None:
    """Show runs, one run with its steps, artifacts, one artifact with its lineage, or who gets traffic (models)."""
    catalog = Catalog(Home.current())
    if what == "runs":
        emit({"runs": [_summary(run) for run in catalog.runs]}, lambda: _runs(catalog), json=json)
    elif what == "artifacts":
        entries = _of_stage(catalog, stage)
        emit({"artifacts": [_artifact_row(entry) for entry in entries]}, lambda: _artifacts(entries), json=json)
    elif what == "models":
        from moestro_services.cli.show_models import show_models

        show_models(catalog.home, json=json)
    elif run := _meant_run(catalog, what):
        data = run.model_dump(mode="json") | {"steps": [_step(catalog, run, at) for at in range(len(run.steps))]}
        emit(data, lambda: _run(catalog, run), json=json)
    else:
        entry = catalog.entry(what)
        lineage = catalog.lineage(entry.record)
        used = [_artifact_row(item) for item in catalog.made_from(entry.record.fingerprint)]
        data = {
            "path": str(entry.path),
            "record": entry.record.model_dump(mode="json"),
            "lineage": lineage,
            "used_by": used,
        }
        emit(data, lambda: _artifact(entry, lineage), json=json)


def _of_stage(catalog: Catalog, stage: str) -> list[Entry]:
    if stage and stage not in STAGES:
        raise InputError(f"There is no stage {stage!r}.", hint=f"Stages are {', '.join(STAGES)}.")
    return [entry for entry in catalog.entries if not stage or entry.record.stage == stage]


def _meant_run(catalog: Catalog, what: str) -> LifecycleRun | None:
    """The run, unless no run is called so: then an artifact is meant. A stage's name always means an artifact."""
    if what == "latest":
        return catalog.run()
    known = any(run.name == what or run.id.startswith(what) for run in catalog.runs)
    return catalog.run(what) if known and what not in STAGES else None


def _summary(run: LifecycleRun) -> dict[str, Any]:
    return run.model_dump(mode="json", include={"id", "name", "status", "started_at", "seconds"}) | {
        "steps": len(run.steps),
        "reused": sum(step.reused for step in run.steps),
    }


def _artifact_row(entry: Entry) -> dict[str, Any]:
    record = entry.record
    return record.model_dump(mode="json", include={"stage", "fingerprint", "created_at", "seconds"}) | {
        "size": record.size,
        "path": str(entry.path),
    }


def _step(catalog: Catalog, run: LifecycleRun, at: int) -> dict[str, Any]:
    """A step of a run with its artifact's size and figures, where it has one."""
    step = run.steps[at]
    entry = catalog.by_fingerprint.get(step.fingerprint)
    extra = {"size": entry.record.size, "result": entry.record.result} if entry else {"size": 0, "result": {}}
    return step.model_dump(mode="json") | extra


def _runs(catalog: Catalog) -> RenderableType:
    if not catalog.runs:
        return f"No runs in {escape(str(catalog.home.path))}. `moestro run CONFIG.yaml` makes one."
    rows = [
        [
            run.id,
            run.name,
            run.status,
            moment(run.started_at),
            duration(run.seconds),
            str(len(run.steps)),
            str(sum(step.reused for step in run.steps)),
        ]
        for run in catalog.runs
    ]
    return table("Runs", ["=run", "name", "=status", "=started", ">time", ">steps", ">reused"], rows)


def _run(catalog: Catalog, run: LifecycleRun) -> RenderableType:
    rows = []
    for at in range(len(run.steps)):
        step = _step(catalog, run, at)
        status = "reused" if step["reused"] else step["status"]
        rows.append(
            [
                step["name"],
                status,
                duration(step["seconds"]),
                size(step["size"]),
                f"{step['stage']}/{step['fingerprint'][:DIGITS]}",
                step["message"] or _key_figures(catalog, step["fingerprint"]),
            ]
        )
    title = f"{run.name}  {run.id}  {run.status}  {duration(run.seconds)}"
    return table(title, ["=step", "=status", ">time", ">size", "=artifact", "figures"], rows)


def _key_figures(catalog: Catalog, fingerprint: str) -> str:
    entry = catalog.by_fingerprint.get(fingerprint)
    return key_figures(entry.record) if entry else ""


def _artifacts(entries: list[Entry]) -> RenderableType:
    if not entries:
        return "No artifacts."
    rows = [
        [
            entry.record.stage,
            entry.record.fingerprint[:DIGITS],
            moment(entry.record.created_at),
            duration(entry.record.seconds),
            size(entry.record.size),
        ]
        for entry in entries
    ]
    return table("Artifacts", ["=stage", "=fingerprint", "=published", ">time", ">size"], rows)


def _artifact(entry: Entry, lineage: list[Ancestor]) -> RenderableType:
    record = entry.record
    facts = [
        ["fingerprint", record.fingerprint],
        ["folder", str(entry.path)],
        ["published", moment(record.created_at)],
        ["made in", duration(record.seconds)],
        ["size", f"{size(record.size)} in {len(record.files)} files"],
        ["code", record.code_version],
    ]
    results = [[name, figure(value)] for name, value in record.result.items()]
    return Group(
        table(f"{record.stage} {record.fingerprint[:DIGITS]}", ["=", ""], facts),
        table("Figures", ["=figure", "value"], results),
        _tree(lineage),
    )


def _tree(lineage: list[Ancestor]) -> Tree:
    """The lineage as a tree; what stands in it twice is spelled out once."""
    by_fingerprint = {ancestor.fingerprint: ancestor for ancestor in lineage}
    expanded: set[str] = set()

    def grow(branch: Tree, ancestor: Ancestor) -> None:
        expanded.add(ancestor.fingerprint)
        for role, fingerprint in ancestor.inputs.items():
            child = by_fingerprint[fingerprint]
            again = " (above)" if fingerprint in expanded and child.inputs else ""
            missing = "" if child.present or child.stage == "files" else " (not in the store)"
            label = f"{role}: {child.stage} {fingerprint[:DIGITS]}{missing}{again}"
            grown = branch.add(escape(label))
            if not again:
                grow(grown, child)

    root = lineage[0]
    tree = Tree(f"{root.stage} {root.fingerprint[:DIGITS]} was made from")
    grow(tree, root)
    return tree
