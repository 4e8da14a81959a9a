"""The documentation builds without a warning, links to what exists, and shows commands that exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
DECISIONS = sorted((ROOT / "docs" / "adr").glob("0*.md"))
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[\w-]*)?\)")
GENERATED = {
    "reference/config.md",
    "reference/cli.md",
    "reference/families.md",
    "reference/lint-rules.md",
    "reference/rest.md",
}
MAX_DECISION_LINES = 45


@pytest.mark.slow
def test_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    config = (tmp_path / "reference" / "config" / "index.html").read_text()
    assert "GlobalBatchLoss" in config
    commands = (tmp_path / "reference" / "cli" / "index.html").read_text()
    assert "moestro plan" in commands
    assert "/v1/completions" in (tmp_path / "reference" / "rest" / "index.html").read_text()
    families = (tmp_path / "reference" / "families" / "index.html").read_text()
    assert all(word in families for word in ("flex_olmo", "vLLM, through transformers", "fine_grained", "gemma3_text"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        if "://" in target:
            continue
        path = (page.parent / target).resolve()
        made = path.is_relative_to(ROOT / "docs") and path.relative_to(ROOT / "docs").as_posix() in GENERATED
        assert made or path.exists(), target


def test_shown_commands_exist() -> None:
    import typer.main

    from moestro_services.cli.app import app

    known = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    shown = {
        (page.name, name)
        for page in PAGES
        for name in re.findall(r"(?:^\$ (?:\S+/)?|`)moestro ([a-z]+)", page.read_text(), flags=re.MULTILINE)
    }
    assert shown
    assert {pair for pair in shown if pair[1] not in known} == set()


@pytest.mark.parametrize("page", DECISIONS, ids=lambda page: page.stem)
def test_a_decision_has_its_three_parts_on_one_page(page: Path) -> None:
    text = page.read_text()
    assert re.findall(r"^## (.+)$", text, flags=re.MULTILINE) == ["Context", "Decision", "Consequences"]
    assert len(text.splitlines()) <= MAX_DECISION_LINES


def test_the_picture_of_the_walk_is_well_formed_and_described() -> None:
    from xml.etree import ElementTree

    root = ElementTree.parse(ROOT / "docs" / "images" / "walk.svg").getroot()
    assert [child.tag.rpartition("}")[2] for child in root[:2]] == ["title", "desc"]
    assert re.search(r"!\[[^\]]{40,}\]\(docs/images/walk\.svg\)", (ROOT / "README.md").read_text())
