"""The audit log: every line whole and on the disk, several writers, no secret, and damage told by its line."""

import subprocess
import sys
from pathlib import Path

import pytest

from moestro.errors import ConfigError
from moestro_services.audit import UNREADABLE, Audit

WRITE = """
import sys
from pathlib import Path
from moestro_services.audit import Audit
audit = Audit(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for at in range(50):
    audit.write(sys.argv[2], "promote", "assistant", at=at, padding="x" * 5000)
"""
SECRET = "mk-" + "A1_-" * 10 + "xyz"


@pytest.fixture
def audit(tmp_path: Path) -> Audit:
    return Audit(tmp_path / "home" / "audit.jsonl")


def test_entries_come_back_newest_first(audit: Audit) -> None:
    assert audit.read() == []
    for at in range(5):
        audit.write("key1", "promote", f"assistant@{at}", share=0.1, forced=None, figures={"loss": [1, 2.5]})
    newest = audit.read(2)
    assert [entry.target for entry in newest] == ["assistant@4", "assistant@3"]
    assert newest[0].details == {"share": 0.1, "forced": None, "figures": {"loss": [1, 2.5]}}
    assert newest[0].at >= newest[1].at
    assert len(audit.read(100)) == 5
    assert audit.read(0) == []


def test_the_file_is_its_owners_alone_and_only_grows(audit: Audit) -> None:
    audit.write("a", "b", "c")
    before = audit.path.read_bytes()
    audit.write("a", "b", "line\nbreak \u2028 é \ud800")
    assert audit.path.stat().st_mode & 0o777 == 0o600
    assert audit.path.read_bytes().startswith(before)
    assert audit.path.read_bytes().count(b"\n") == 2
    assert audit.read()[0].target.startswith("line\nbreak \u2028 é")


def test_several_processes_write_whole_lines(audit: Audit) -> None:
    command = [sys.executable, "-c", WRITE, str(audit.path)]
    processes = [
        subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for name in "ab"
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.communicate("\n", timeout=60)
        assert process.returncode == 0
    entries = audit.read(1000)
    for name in "ab":
        assert [entry.details["at"] for entry in entries if entry.actor == name] == [*range(49, -1, -1)]


@pytest.mark.parametrize("damage", [b'{"at": "2026', b"\xff\xff", b"{}", b"[]", b"[" * 100_000, b'{"at": 3}'])
def test_a_line_that_was_cut_off_is_told_and_spoils_no_other(audit: Audit, damage: bytes) -> None:
    audit.write("a", "promote", "one")
    with audit.path.open("ab") as file:
        file.write(damage)
    assert [entry.action for entry in audit.read()] == [UNREADABLE, "promote"]
    audit.write("a", "rollback", "two")
    newest, damaged, first = audit.read()
    assert (newest.target, first.target) == ("two", "one")
    assert damaged.target == "line 2 of audit.jsonl"
    assert damaged.at == first.at


def test_no_secret_is_written(audit: Audit) -> None:
    audit.write(
        SECRET,
        f"create {SECRET}",
        SECRET,
        note=f"Bearer {SECRET}",
        nested=[{"deep": (SECRET,), SECRET: 1}],
        api_key="hunter2",
        Authorization="hunter2",
        more={"client_secret": "hunter2", "password": ["hunter2"]},
        tokens=12,
        token_limit=3,
        path=Path(SECRET),
    )
    content = audit.path.read_text()
    assert SECRET not in content
    assert "hunter2" not in content
    assert audit.read()[0].details["tokens"] == 12


def test_figures_that_json_does_not_know_are_words(audit: Audit) -> None:
    audit.write("a", "promote", "b", loss=float("nan"), worst=float("inf"))
    assert audit.read()[0].details == {"loss": "nan", "worst": "inf"}


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "audit.jsonl").mkdir()
    with pytest.raises(ConfigError, match="cannot be written"):
        Audit(tmp_path / "audit.jsonl").write("a", "b", "c")
    with pytest.raises(ConfigError, match="cannot be read"):
        Audit(tmp_path / "audit.jsonl").read()
