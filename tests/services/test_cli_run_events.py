"""`moestro run --json --events FILE`: what happens goes to a file."""

import json
from pathlib import Path

import pytest

from moestro.errors import ConfigError
from moestro_services.cli.json_events import JsonEvents
from moestro_services.cli.run import event_stream


def test_events_are_written_at_the_files_end_as_they_happen(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for step in ("seed", "mix"):
        with event_stream(path) as stream:
            JsonEvents(stream).started(step)
            assert json.loads(path.read_text().splitlines()[-1]) == {"event": "started", "step": step}
    assert len(path.read_text().splitlines()) == 2


def test_without_a_file_they_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with event_stream(None) as stream:
        JsonEvents(stream).started("seed")
    assert json.loads(capsys.readouterr().err)["step"] == "seed"


def test_a_file_that_cannot_be_written_is_a_mistake_to_mend(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"), event_stream(tmp_path):
        pass
