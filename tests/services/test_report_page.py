"""The report: one file, nothing loaded from elsewhere, everything of the run in it."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from moestro_flows.home import Home
from moestro_services.catalog import Catalog
from moestro_services.report import page, write_report

VOID = {"meta", "img", "br", "link"}


class Balanced(HTMLParser):
    """Collects elements and their attributes; fails on tags that do not match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parsed(text: str) -> Balanced:
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    return parser


@pytest.fixture
def text(built_home: Home) -> str:
    catalog = Catalog(built_home)
    return page(catalog, catalog.run())


def test_the_page_loads_nothing_from_elsewhere(text: str) -> None:
    for tag, name, value in parsed(text).attributes:
        if name in {"src", "href", "srcset", "action", "data", "xlink:href"}:
            assert value.startswith("data:"), (tag, name, value[:80])
    assert "<script" not in text
    assert "@import" not in text
    assert "url(" not in text


def test_every_step_stands_in_the_page(text: str, built_home: Home) -> None:
    run = Catalog(built_home).run()
    assert len(run.steps) > 15
    for step in run.steps:
        assert f">{step.name}<" in text
        assert step.fingerprint[:16] in text


def test_plots_are_inlined_and_described(text: str) -> None:
    pictures = [value for tag, name, value in parsed(text).attributes if (tag, name) == ("img", "src")]
    described = [value for tag, name, value in parsed(text).attributes if (tag, name) == ("img", "alt")]
    # held-out loss, three trainings, reward, two heatmaps for each of four profiles
    assert len(pictures) == 1 + 3 + 1 + 2 * 4
    assert all(described)
    assert all(base64.b64decode(item.split(",")[1]).startswith(b"<?xml") for item in pictures)


def test_what_models_wrote_is_escaped(text: str) -> None:
    assert "&lt;b&gt;1 + 1&lt;/b&gt;" in text
    assert "<b>1 + 1" not in text


def test_stages_stand_in_the_order_of_the_lifecycle(text: str) -> None:
    table = text[text.index("Quality after each stage") :]
    positions = [table.index(f'<td class="text">{name}</td>') for name in ("seed", "mix", "tune", "rl", "compress")]
    assert positions == sorted(positions)


def test_the_config_and_figures_are_in_it(text: str) -> None:
    for needle in ("num_experts: 2", "Deployment gate", "0.45", "3.0 MB", "routing agreement"):
        assert needle in text
    assert re.search(r"<svg[^>]*viewBox", text)


def test_a_failed_run_without_artifacts_still_has_a_report(tmp_path: Path, built_home: Home) -> None:
    run = Catalog(built_home).run()
    broken = run.steps[-1].model_copy(
        update={"status": "failed", "fingerprint": "f" * 64, "message": "loss is <nan> at step 3"}
    )
    failed = run.model_copy(update={"status": "failed", "steps": (run.steps[0], broken)})
    text = page(Catalog(Home(tmp_path / "nowhere")), failed)
    parsed(text)
    assert "loss is &lt;nan&gt; at step 3" in text


def test_writing_leaves_one_file(built_home: Home, tmp_path: Path) -> None:
    catalog = Catalog(built_home)
    target = tmp_path / "out" / "report.html"
    target.parent.mkdir()
    write_report(catalog, catalog.run(), target)
    assert [path.name for path in target.parent.iterdir()] == ["report.html"]
    assert target.read_text() == page(catalog, catalog.run())
