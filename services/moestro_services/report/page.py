"""The page: header, headline figures and one function per section."""

import os
from importlib.resources import files
from pathlib import Path

import yaml

from moestro.artifacts import LifecycleRun
from moestro_flows.summary import figures as key_figures
from moestro_services.catalog import DIGITS, Catalog
from moestro_services.cli.output import duration, moment, size
from moestro_services.report import plots
from moestro_services.report.headline import headline
from moestro_services.report.lineage import diagram
from moestro_services.report.markup import Html, folded, join, section, table, tag
from moestro_services.report.story import Story, Told

STYLE = "style.css"


def write_report(catalog: Catalog, run: LifecycleRun, path: Path) -> None:
    """Write the page about `run` to `path` in one step: an older page stays until the new one is complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(page(catalog, run))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def page(catalog: Catalog, run: LifecycleRun) -> str:
    """The page about `run` as one HTML document that loads nothing from elsewhere."""
    story = Story.of(catalog, run)
    style = (files(__package__) / STYLE).read_text()
    head = join(
        [
            Html('<meta charset="utf-8">'),
            Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
            Html('<meta name="color-scheme" content="light dark">'),
            tag("title", f"{run.name} · {run.id}"),
            Html(f"<style>{style}</style>"),
        ]
    )
    body = [_header(story), headline(story), *_sections(story), _footer(story)]
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>{join(body)}</main></body></html>\n'


def _sections(story: Story) -> list[Html]:
    return [
        section("Quality after each stage", plots.held_out(story), _evaluations(story)),
        section("Training", *_side_by_side(plots.training(story))),
        section("Reinforcement learning", plots.reward(story)),
        section("Experts", *_experts(story), note="Measured on held-out text that no stage was trained on."),
        section("Answers of the final checkpoint", _samples(story), note="Greedy, to held-out problems."),
        section("Deployment gates", _gate(story)),
        section("Steps", _steps(story), note="Times are those of the work, also where an earlier run did it."),
        section("Lineage", diagram(story)),
        section("Config", folded("The complete configuration", tag("pre", _yaml(story)))),
    ]


def _header(story: Story) -> Html:
    run = story.run
    reused = sum(item.step.reused for item in story.steps)
    facts = f"{moment(run.started_at)} · {duration(run.seconds)} · {len(story.steps)} steps, {reused} reused"
    status = tag("span", run.status, class_=f"status {run.status}")
    failures = [
        tag("p", f"{item.step.name}: {item.step.message}", class_="failure")
        for item in story.steps
        if item.step.status == "failed"
    ]
    return tag("header", tag("h1", run.name, " ", status), tag("p", f"Run {run.id} · {facts}"), *failures)


def _evaluations(story: Story) -> Html:
    if not story.evaluations:
        return Html("")
    results = {name: item.result for name, item in story.evaluations.items()}
    domains = list(dict.fromkeys(domain for result in results.values() for domain in result["held_out_loss"]))
    rows = [
        [
            name,
            *(_decimals(result["held_out_loss"].get(domain), 3) for domain in domains),
            _decimals(result.get("geometric_mean_perplexity"), 2),
            _percent(result.get("task_accuracy")),
            _percent(result.get("sampled_accuracy")),
        ]
        for name, result in results.items()
    ]
    losses = [f">loss {domain}" for domain in domains]
    columns = ["checkpoint", *losses, ">perplexity (geometric mean)", ">task, greedy", ">task, sampled"]
    return table(columns, rows)


def _experts(story: Story) -> list[Html]:
    profiles = list(story.profiles.values())
    if not profiles:
        return []
    rows = [
        [
            item.subject,
            str(item.result.get("dead_experts", "")),
            _decimals(item.result.get("max_violation"), 2),
            ", ".join(
                f"{name} {_decimals(value, 2) or 'none'}"
                for name, value in item.result.get("specialisation", {}).items()
            ),
        ]
        for item in profiles
    ]
    columns = ["checkpoint", ">dead experts", ">largest load over mean, less 1", "own expert's share, in even shares"]
    earlier = [
        folded(item.subject, tag("div", plots.experts(item), plots.together(item), class_="plots"))
        for item in profiles[:-1]
    ]
    shown = tag("div", plots.experts(profiles[-1]), plots.together(profiles[-1]), class_="plots")
    return [shown, table(columns, rows), *earlier]


def _side_by_side(pictures: Html) -> list[Html]:
    return [tag("div", pictures, class_="plots")] if pictures else []


def _samples(story: Story) -> Html:
    samples = story.samples()
    if not samples:
        return Html("")
    rows = [
        [
            tag("code", sample["prompt"]),
            tag("code", sample["answer"]),
            tag("code", sample["completion"].strip()),
            _decimals(sample["score"], 2),
        ]
        for sample in samples
    ]
    return table(["prompt", "right", "answered", ">score"], rows)


def _gate(story: Story) -> Html:
    deploy = story.named("deploy")
    if deploy is None:
        return Html("")
    rows = [[name.replace("_", " "), _shown(value)] for name, value in deploy.result.items()]
    return table(["figure", "value"], rows)


def _steps(story: Story) -> Html:
    longest = max((item.work_seconds for item in story.steps), default=0.0) or 1.0
    return table(
        ["step", "", ">time", "", ">size", "figures", "artifact"], [_step(item, longest) for item in story.steps]
    )


def _step(item: Told, longest: float) -> list[object]:
    status = "reused" if item.step.reused else item.step.status
    share = 100 * item.work_seconds / longest
    bar = tag("div", tag("div", style=f"width:{share:.1f}%"), class_="bar")
    record = item.entry.record if item.entry else None
    return [
        item.step.name,
        tag("span", status, class_=f"status {status}"),
        duration(item.work_seconds),
        bar,
        size(record.size) if record else "",
        key_figures(record) if record else item.step.message,
        tag("code", item.step.fingerprint[:DIGITS], title=item.step.fingerprint),
    ]


def _footer(story: Story) -> Html:
    versions = sorted({item.entry.record.code_version for item in story.steps if item.entry})
    return tag("footer", tag("p", f"Moestro {', '.join(versions)}"))


def _yaml(story: Story) -> str:
    return yaml.safe_dump(story.run.config, sort_keys=False, allow_unicode=True)


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_shown(item)}" for name, item in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _decimals(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
