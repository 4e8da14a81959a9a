"""Alerts and dashboards ask for time series that the gateway has, by labels that these bear, and are all explained."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
GATEWAY = ROOT / "services" / "moestro_services" / "gateway"
GUIDE = ROOT / "docs" / "guides" / "observing.md"
SUFFIXES = {
    "Counter": ("_total",),
    "CounterMetricFamily": ("_total",),
    "Gauge": ("",),
    "GaugeMetricFamily": ("",),
    "Histogram": ("_bucket", "_sum", "_count"),
    "_counts": ("_total",),
}
SCRAPED = {"job", "instance", "service"}
"""Labels that Prometheus adds."""
SERIES = re.compile(r"\bmoestro_\w+|\bup\b")


def known_series() -> set[str]:
    """Every time series that a module of the gateway makes, as Prometheus names it."""
    found = {"up"}
    for path in GATEWAY.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in SUFFIXES:
                names = [word.value for word in node.args[:1] if isinstance(word, ast.Constant)]
                found |= {f"{name}{suffix}" for name in names for suffix in SUFFIXES[node.func.id]}
    return found


def expert_labels() -> dict[str, set[str]]:
    """The labels of the experts' series."""
    from moestro_services.gateway.expert_metrics_series import describe

    families: list[Any] = list(describe())
    return {
        family.name + ("_total" if family.type == "counter" else ""): set(family._labelnames) for family in families
    }


def dashboard() -> dict[str, Any]:
    made: dict[str, Any] = json.loads((INFRA / "grafana" / "dashboard.json").read_text())
    return made


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((INFRA / "prometheus-rules.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def questions() -> Iterator[tuple[str, str, str]]:
    """Where it stands, the expression, and the words in which its labels are shown."""
    for rule in rules():
        yield rule["alert"], rule["expr"], rule["annotations"]["summary"]
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"], target["legendFormat"]
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["query"]["query"], ""


QUESTIONS = list(questions())


@pytest.mark.parametrize(("where", "expression", "_shown"), QUESTIONS)
def test_every_series_that_is_asked_for_exists(where: str, expression: str, _shown: str) -> None:
    asked = set(SERIES.findall(expression))
    assert asked, where
    assert asked <= known_series(), where


@pytest.mark.parametrize(("where", "expression", "shown"), QUESTIONS)
def test_every_label_that_is_used_is_one_of_its_series(where: str, expression: str, shown: str) -> None:
    labels = expert_labels()
    asked = set(SERIES.findall(expression))
    if not asked <= set(labels):
        return  # traffic's own are named in traffic.py, which its own tests cover
    used = set(re.findall(r"[{,]\s*(\w+)\s*[=!]~?\"?", expression))
    for grouped in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression):
        used |= {label.strip() for label in grouped.split(",")}
    used |= set(re.findall(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}", shown))
    assert used <= set.union(*(labels[name] for name in asked)) | SCRAPED, where


@pytest.mark.parametrize(("where", "expression", "_shown"), QUESTIONS)
def test_expressions_are_balanced(where: str, expression: str, _shown: str) -> None:
    bare = re.sub(r'"[^"]*"', '""', expression)
    for opening, closing in ("()", "[]", "{}"):
        assert bare.count(opening) == bare.count(closing), where
    assert bare.count('"') % 2 == 0, where


def test_every_alert_says_how_bad_and_for_how_long() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names)
    for rule in rules():
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert re.fullmatch(r"\d+m", rule["for"])


def test_the_guide_explains_every_alert_and_every_series_of_experts() -> None:
    text = GUIDE.read_text()
    assert [rule["alert"] for rule in rules() if f"`{rule['alert']}`" not in text] == []
    assert [name for name in expert_labels() if f"`{name}`" not in text] == []
    assert set(re.findall(r"`(moestro_\w+)`", text)) <= known_series()


def test_the_guide_names_every_reason_and_setting() -> None:
    from moestro_services.gateway.expert_metrics_sampling import Reason, Sampling

    text = GUIDE.read_text()
    assert [reason.value for reason in Reason if f"`{reason.value}`" not in text] == []
    rows = [f"| `{name}` | `{field.default}` |" for name, field in Sampling.model_fields.items()]
    assert [row for row in rows if row not in text] == []


def test_panels_do_not_overlap_and_ask_the_chosen_source() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${source}"
            assert panel["description"]
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(set(ids)) == len(ids)


def test_compose_hands_out_what_the_configuration_reads() -> None:
    compose = yaml.safe_load((INFRA / "compose.yaml").read_text())
    for name, config in compose["configs"].items():
        assert "content" in config or (INFRA / config["file"]).is_file(), name
    handed = {
        item["target"]
        for service in ("prometheus", "grafana")
        for item in compose["services"][service]["configs"]
        if item["source"] in compose["configs"]
    }
    secrets = {f"/run/secrets/{name}" for name in compose["services"]["prometheus"]["secrets"]}
    prometheus = yaml.safe_load((INFRA / "prometheus.yaml").read_text())
    (scrape,) = prometheus["scrape_configs"]
    (files,) = scrape["file_sd_configs"]
    assert {*prometheus["rule_files"], *files["files"]} <= handed
    assert scrape["authorization"]["credentials_file"] in secrets
    assert json.loads(compose["configs"]["prometheus_gateways"]["content"])[0]["targets"] == ["gateway:8000"]
    (provider,) = yaml.safe_load((INFRA / "grafana" / "dashboards.yaml").read_text())["providers"]
    assert any(target.startswith(provider["options"]["path"] + "/") for target in handed)
    (source,) = yaml.safe_load((INFRA / "grafana" / "datasources.yaml").read_text())["datasources"]
    assert dashboard()["templating"]["list"][0]["current"]["value"] == source["uid"]
