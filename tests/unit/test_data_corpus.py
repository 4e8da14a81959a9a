"""The corpus stage: deterministic to the byte, split by the text alone, refusing what cannot be split."""

import hashlib
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from moestro.artifacts import Job
from moestro.config import CorpusConfig
from moestro.data.builtin import clean_markup, is_prose, parts, stdlib_files, without_repeats
from moestro.data.corpus import corpus
from moestro.data.documents import is_held_out, normalise, place, text_id
from moestro.data.sources import documents, identify
from moestro.data.tasks import is_held_out_prompt
from moestro.errors import InputError

MATH = {"type": "task", "problems": 200, "tasks": [{"name": "chain_sum"}, {"name": "gcd"}, {"name": "chain_sum"}]}


def config(source: dict[str, Any], **split: Any) -> CorpusConfig:
    return CorpusConfig.model_validate({"domain": {"name": "mine", "source": source}, "split": split})


def files(folder: Path, texts: list[str]) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text)
    return {"type": "files", "paths": [f"{folder}/*.txt"]}


def run(folder: Path, stage_config: CorpusConfig) -> tuple[dict[str, Any], Path]:
    out, scratch = folder / "out", folder / "scratch"
    out.mkdir(parents=True)
    scratch.mkdir()
    return corpus(stage_config, job=Job(out=out, scratch=scratch)), out


def rows(out: Path, side: str) -> list[dict[str, str]]:
    table: list[dict[str, str]] = pq.read_table(out / f"{side}.parquet").to_pylist()
    return table


@pytest.mark.parametrize(
    "source",
    [
        {"type": "builtin", "name": "stdlib", "max_bytes": 2_000_000},
        {"type": "builtin", "name": "docs", "max_bytes": 500_000},
        MATH,
    ],
    ids=["stdlib", "docs", "math"],
)
def test_every_source_gives_the_same_bytes_twice_and_disjoint_sides(tmp_path: Path, source: dict[str, Any]) -> None:
    result, out = run(tmp_path / "a", config(source))
    again, same = run(tmp_path / "b", config(source))
    assert result == again
    for name in ("train.parquet", "held_out.parquet"):
        assert (out / name).read_bytes() == (same / name).read_bytes()
    train, held_out = rows(out, "train"), rows(out, "held_out")
    assert (len(train), len(held_out)) == (result["documents"], result["held_out_documents"])
    ids = [row["id"] for row in train + held_out]
    assert len(set(ids)) == len(ids)
    assert all(row["id"] == hashlib.sha256(row["text"].encode()).hexdigest() for row in train + held_out)
    assert sum(len(row["text"].encode()) for row in train) == result["bytes"]
    assert result["bytes"] + result["held_out_bytes"] <= source.get("max_bytes", 10**9)
    assert identify(config(source)) == identify(config(source))


def test_side_depends_on_the_text_alone(tmp_path: Path) -> None:
    texts = [f"text number {number}" for number in range(300)]
    _, first = run(tmp_path / "a", config(files(tmp_path / "fa", texts[:200]), seed=0, held_out_fraction=0.2))
    _, second = run(tmp_path / "b", config(files(tmp_path / "fb", texts[::-1]), seed=7, held_out_fraction=0.2))
    train = {row["id"] for row in rows(first, "train")}
    held_out = {row["id"] for row in rows(first, "held_out")}
    assert train <= {row["id"] for row in rows(second, "train")}
    assert held_out <= {row["id"] for row in rows(second, "held_out")}
    assert 0.1 < len(held_out) / 200 < 0.3


def test_seed_changes_the_order_only(tmp_path: Path) -> None:
    source = files(tmp_path / "f", [f"text number {number}" for number in range(100)])
    outs = [run(tmp_path / str(seed), config(source, seed=seed))[1] for seed in (0, 1)]
    first, second = ([row["id"] for row in rows(out, "train")] for out in outs)
    assert first != second
    assert sorted(first) == sorted(second)


def test_duplicates_and_empty_texts_are_dropped(tmp_path: Path) -> None:
    texts = [f"text number {number}" for number in range(60)]
    result, out = run(tmp_path, config(files(tmp_path / "f", [*texts, "text number 3  \r\n\n", " \n "])))
    assert result["duplicates"] == 1
    assert result["documents"] + result["held_out_documents"] == 60
    assert {row["text"] for row in rows(out, "train") + rows(out, "held_out")} == {f"{text}\n" for text in texts}


def test_problems_are_split_by_their_prompt(tmp_path: Path) -> None:
    sides: dict[str, set[str]] = {"train": set(), "held_out": set()}
    for seed in (0, 1):
        _, out = run(tmp_path / str(seed), config(MATH, seed=seed))
        for side, prompts in sides.items():
            prompts |= {row["text"].rpartition(" ")[0] for row in rows(out, side)}
            assert len(rows(out, "train")) + len(rows(out, "held_out")) == 200
    assert not sides["train"] & sides["held_out"]
    assert len(sides["train"] | sides["held_out"]) > 380
    assert all(is_held_out_prompt(prompt) for prompt in sides["held_out"])


@pytest.mark.parametrize(
    ("texts", "split", "said"),
    [
        (["", " "], {}, "has no text"),
        (["a", "b"], {}, "has 2 documents"),
        (["a", "b"], {"min_documents": 2, "held_out_fraction": 1e-9}, "no held-out document"),
    ],
)
def test_what_cannot_be_split_is_refused(tmp_path: Path, texts: list[str], split: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        run(tmp_path, config(files(tmp_path / "f", texts), **split))
    assert error.value.hint


def test_no_training_document_is_refused(tmp_path: Path) -> None:
    held_out = [text for text in map(str, range(200)) if is_held_out(text_id(f"{text}\n"), 0.49)]
    with pytest.raises(InputError, match="no training document"):
        run(tmp_path, config(files(tmp_path / "f", held_out), held_out_fraction=0.49))


def test_stdlib_leaves_out_tests_packages_and_tables() -> None:
    names = [name for name, _ in stdlib_files()]
    assert "argparse.py" in names
    assert "json/decoder.py" in names
    assert names == sorted(names)
    folders = {part for name in names for part in Path(name).parts[:-1]}
    assert not folders & {"site-packages", "test", "tests", "idle_test", "__pycache__"}
    assert not {"pydoc_data/topics.py", "html/entities.py", "encodings/cp1252.py"} & set(names)


def test_prose_is_kept_and_markup_goes() -> None:
    text = (
        "[![badge](https://b.example/x.svg)](https://b.example)\n# Title\n<p align='center'>hello</p>\n"
        "See [the manual](https://m.example) and `the site <https://s.example>`_.\n"
        "```python\nimport this\n```\n.. image:: x.png\n   :alt: no\nEnd of it.\n"
    )
    cleaned = clean_markup(text)
    assert cleaned == "# Title\nhello\nSee the manual and the site.\n\nEnd of it."
    assert is_prose("This is what is meant by a text that is in English, and it is long. " * 10)
    assert not is_prose("import numpy; numpy.zeros((3, 3)).reshape(-1) " * 20)
    assert not is_prose("This is too short to be of use.")


def test_prose_documents_share_no_long_paragraph() -> None:
    source = config({"type": "builtin", "name": "docs"})
    paragraphs = [part for document in documents(source) for part in document.text.split("\n\n") if len(part) > 120]
    assert len(paragraphs) == len(set(paragraphs))


def test_parts_lose_nothing() -> None:
    text = "\n\n".join(f"paragraph {number} " + "word " * (number % 40) * 10 for number in range(60))
    pieces = list(parts(text))
    assert "\n\n".join(pieces) == text
    assert 1 < len(pieces) < 60
    assert without_repeats(text, set()) == text


def test_normal_form() -> None:
    assert normalise("\n\n  a \r\nb\r\n\r\n", origin="x") == "  a\nb\n"
    assert normalise("e\u0301", origin="x") == "\u00e9\n"
    assert normalise(" \t\n", origin="x") == ""
    assert normalise(normalise("a\t\n\n b", origin="x"), origin="x") == normalise("a\t\n\n b", origin="x")


def test_place_is_unrelated_to_the_side() -> None:
    ids = sorted((text_id(str(number)) for number in range(4000)), key=lambda identity: place(identity, 0))
    first_half = sum(is_held_out(identity, 0.1) for identity in ids[:2000])
    assert 140 < first_half < 260
