"""Domains that join a finished lifecycle: one that is trained, with general text, and one whose branch exists."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PROSE = {"name": "prose", "source": {"type": "builtin", "name": "docs", "max_bytes": 400_000}}


def variant(config: Path, target: Path, *domains: dict[str, Any], **branch: Any) -> Path:
    """The tiny lifecycle up to its tuning, with further domains that its seed does not know."""
    data = yaml.safe_load(config.read_text())
    for stage in ("rl", "compress", "deploy"):
        del data[stage]
    data["data"]["domains"] += domains
    data["seed"]["domains"] = ["code", "math"]
    data["branch"] |= branch
    target.write_text(yaml.safe_dump(data))
    return target


def run(moestro: Any, home: Path, config: Path) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the run by step, and what was told meanwhile."""
    code, out, err = moestro.run(home, "run", str(config), "--json")
    assert code == 0, err[-4000:]
    events = [json.loads(line) for line in err.splitlines() if line.startswith("{")]  # libraries warn in between
    return {row["step"]: row for row in json.loads(out)["steps"]}, events


def test_new_domains_run_their_own_steps_the_mix_and_what_follows(moestro: Any, finished: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(finished / "artifacts", home / "artifacts")
    first, _ = run(moestro, home, variant(moestro.config, tmp_path / "one.yaml"))
    assert {row["status"] for row in first.values()} == {"reused"}

    source = yaml.safe_load(moestro.config.read_text())["data"]["domains"][1]["source"] | {"problems": 1500}
    sums = {"name": "sums", "source": source}
    kind, _, digits = first["branch math"]["artifact"].partition("/")
    config = variant(
        moestro.config,
        tmp_path / "two.yaml",
        PROSE,
        sums,
        existing={"sums": {"path": str(home / "artifacts" / kind / digits)}},
        overrides={"prose": {"general_share": 0.25, "trainable": "all"}},
    )
    second, events = run(moestro, home, config)
    assert {event["event"] for event in events} == {"planned", "started", "progress", "ended"}
    told = [event for event in events if event["event"] == "progress" and event["step"] == "branch prose"]
    assert told
    assert all(event["total"] == 40 for event in told)
    ran = {name for name, row in second.items() if row["status"] == "completed"}
    measured = {name for name in second if name.startswith(("evaluate", "profile"))}
    own = {f"{stage} {name}" for stage in ("corpus", "tokens", "branch") for name in ("prose", "sums")}
    assert ran - measured == own | {"mix", "tune"}
    for name in ("seed", "branch code", "branch math"):
        assert second[name]["artifact"] == first[name]["artifact"]
    assert second["branch sums"]["figures"] == "imported from a directory"
    mixed = home / "artifacts" / second["mix"]["artifact"]
    origins = json.loads((mixed / "experts.json").read_text())["origins"]
    assert origins == [["code", "math", "prose", "sums", "seed"]] * 2
    record = json.loads((home / "artifacts" / second["branch prose"]["artifact"] / "artifact.json").read_text())
    assert {role for role in record["inputs"] if role.startswith("general")} == {
        "general/code",
        "general/math",
        "general/sums",
    }
