"""The store publishes whole artifacts, checks every byte of them, and says what is wrong with one that changed."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from moestro.artifacts import (
    RECORD_NAME,
    Artifact,
    ArtifactStore,
    Input,
    LifecycleRun,
    Record,
    StepRun,
    digest_files,
    fingerprint,
    read_runs,
)
from moestro.errors import ArtifactError

IDENTITY = fingerprint("mix", "1", {}, {})


def record(folder: Path, **changes: Any) -> Record:
    values: dict[str, Any] = {
        "stage": "mix",
        "version": "1",
        "fingerprint": IDENTITY,
        "inputs": {"branches/code": Input(stage="branch", fingerprint="ab" * 32)},
        "config": {"seed": 0},
        "result": {"loss": 0.1 + 0.2, "by_domain": {"code": 1.5}, "missing": None},
        "files": digest_files(folder),
        "code_version": "0.1.0",
        "created_at": datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC),
        "seconds": 1.25,
    }
    return Record(**(values | changes))


def publish(store: ArtifactStore) -> Artifact:
    with store.work("mix", IDENTITY) as work:
        (work.out / "model.bin").write_bytes(bytes(range(256)) * 40)
        (work.out / "deep").mkdir()
        (work.out / "deep" / "notes.json").write_text("{}")
        (work.scratch / "state").write_text("half way")
        return store.publish(work, record(work.out))


def test_published_artifact_is_found_with_its_record(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    assert store.find("mix", IDENTITY) is None
    made = publish(store)
    found = store.find("mix", IDENTITY)
    assert found == made
    assert found is not None
    assert sorted(found.record.files) == ["deep/notes.json", "model.bin"]
    assert found.record.size == 256 * 40 + 2
    assert Artifact.open(made.path) == made


def test_publishing_clears_the_work_folder(tmp_path: Path) -> None:
    publish(ArtifactStore(tmp_path))
    assert [path.suffix for path in (tmp_path / "work" / "mix").iterdir()] == [".lock"]


def test_a_flipped_bit_is_named_and_refused(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    path = publish(store).path / "model.bin"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"Corrupted artifact: .*/model\.bin does not match its digest"):
        store.find("mix", IDENTITY)
    with pytest.raises(ArtifactError, match=r"Corrupted artifact: .*/model\.bin does not match its digest"):
        Artifact.open(path.parent)


def test_a_missing_file_is_named_and_refused(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    (publish(store).path / "deep" / "notes.json").unlink()
    with pytest.raises(ArtifactError, match=r"Corrupted artifact: .*/deep/notes\.json is missing"):
        store.find("mix", IDENTITY)


def test_a_stray_file_is_named_and_refused(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    (publish(store).path / "deep" / "model-00002.safetensors").write_text("?")
    with pytest.raises(ArtifactError, match=r"not published: \['deep/model-00002\.safetensors'\]"):
        store.find("mix", IDENTITY)


@pytest.mark.parametrize("content", [None, "", "{", '{"stage": "mix"}'])
def test_an_artifact_without_a_readable_record_is_refused(tmp_path: Path, content: str | None) -> None:
    store = ArtifactStore(tmp_path)
    path = publish(store).path / RECORD_NAME
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(ArtifactError, match=RECORD_NAME):
        store.find("mix", IDENTITY)


def test_an_artifact_in_anothers_place_is_refused(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    made = publish(store)
    other = fingerprint("mix", "2", {}, {})
    made.path.rename(store.folder("mix", other))
    with pytest.raises(ArtifactError, match=f"holds mix {IDENTITY[:16]}, not mix {other[:16]}"):
        store.find("mix", other)


def test_an_attempt_that_raises_publishes_nothing_and_keeps_its_scratch(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)

    def attempt() -> None:
        with store.work("mix", IDENTITY) as work:
            (work.out / "half").write_text("half")
            (work.scratch / "state").write_text("step 3")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        attempt()
    assert store.find("mix", IDENTITY) is None
    with store.work("mix", IDENTITY) as work:
        assert (work.scratch / "state").read_text() == "step 3"
        assert list(work.out.iterdir()) == []


def test_a_record_survives_writing_and_reading(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    made = publish(store)
    read = Record.read(made.path)
    assert read == record(made.path)
    assert [(path, found.fingerprint) for path, found in store.records()] == [(made.path, IDENTITY)]
    assert list(store.records("tune")) == []


def test_files_from_outside_are_known_by_their_contents(tmp_path: Path) -> None:
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "config.json").write_text("{}")
    here, there = Artifact.open(tmp_path / "here"), Artifact.open(tmp_path / "there")
    assert (here.stage, here.fingerprint) == ("files", there.fingerprint)
    with pytest.raises(ArtifactError, match="no such file or directory"):
        Artifact.open(tmp_path / "nowhere")


def run(number: int) -> LifecycleRun:
    started = datetime(2026, 1, number, tzinfo=UTC)
    step = StepRun(name="branch code", stage="branch", fingerprint=IDENTITY, status="completed", started_at=started)
    return LifecycleRun(
        id=f"2026010{number}-aa", name="small", status="running", config={}, started_at=started, steps=(step,)
    )


def test_runs_are_read_oldest_first_and_rewritten_in_place(tmp_path: Path) -> None:
    for number in (2, 1):
        run(number).write(tmp_path)
    done = run(2).model_copy(update={"status": "completed", "seconds": 3.5})
    done.write(tmp_path)
    assert list(read_runs(tmp_path)) == [run(1), done]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["20260101-aa.json", "20260102-aa.json"]
    assert list(read_runs(tmp_path / "none")) == []


def test_an_unreadable_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "20260101-aa.json").write_text('{"id": ')
    with pytest.raises(ArtifactError, match=r"20260101-aa\.json is not a readable run record"):
        list(read_runs(tmp_path))
