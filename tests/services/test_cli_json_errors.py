"""With --json standard output is one JSON document, whatever fails and whatever others print meanwhile."""

import json
import os
import subprocess
import sys

import pytest

from moestro_services.cli.output import others_on_stderr

BOOM = """
import sys
from moestro_services.cli.app import app, main
from moestro_services.cli.output import Json

@app.command()
def boom(json: Json = False) -> None:
    raise ValueError("\\x1b[31mnobody foresaw this\\x1b[0m\\nnor that")

sys.argv = ["moestro", "boom", *sys.argv[1:]]
main()
"""
OTHERS = """
import os, subprocess, sys
from moestro_services.cli.output import others_on_stderr

print("before")
early = sys.stdout
with others_on_stderr():
    print("a library")
    early.write("one that keeps the stream\\n")
    os.write(1, b"a library in C\\n")
    subprocess.run(["/bin/sh", "-c", "echo a child"], check=True)
print("after")
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_an_unexpected_error_is_a_document_too() -> None:
    ended = python(BOOM, "--json")
    assert ended.returncode == 1
    error = json.loads(ended.stdout)["error"]
    assert (error["kind"], error["message"]) == ("ValueError", "ValueError: nobody foresaw this")
    assert "Traceback" in ended.stderr


def test_without_json_it_is_its_traceback() -> None:
    ended = python(BOOM)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "Traceback" in ended.stderr


def test_what_others_print_goes_to_standard_error() -> None:
    ended = python(OTHERS)
    assert ended.stdout == "before\nafter\n"
    assert sorted(ended.stderr.splitlines()) == ["a child", "a library", "a library in C", "one that keeps the stream"]


def test_standard_output_is_back_after_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="no"), others_on_stderr():
        raise ValueError("no")
    os.write(1, b"back\n")
    assert capfd.readouterr().out == "back\n"
