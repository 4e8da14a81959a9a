"""Reading a user's own files: every format and compression, and what is said of the malformed."""

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from moestro.config import CorpusConfig
from moestro.data.sources import documents, identify
from moestro.errors import InputError

TEXTS = ["first text\n", "zweiter Text: äöü\n", "third\nwith lines\n"]


def config(*paths: Path | str, **source: str) -> CorpusConfig:
    domain = {"name": "mine", "source": {"type": "files", "paths": [str(path) for path in paths], **source}}
    return CorpusConfig.model_validate({"domain": domain})


def texts(*paths: Path | str, **source: str) -> list[str]:
    return sorted(document.text for document in documents(config(*paths, **source)))


def jsonl(field: str = "text") -> bytes:
    return "".join(json.dumps({field: text}) + "\n" for text in TEXTS).encode()


def compressed(path: Path, content: bytes) -> Path:
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        content = zstandard.compress(content)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_reads_jsonl(tmp_path: Path, suffix: str) -> None:
    path = compressed(tmp_path / f"a.jsonl{suffix}", jsonl() + b"\n")
    assert texts(path) == sorted(TEXTS)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_reads_text_as_one_document(tmp_path: Path, suffix: str) -> None:
    path = compressed(tmp_path / f"a.md{suffix}", "\ufeff# Title\r\n\r\nprose  \r\n".encode())
    assert texts(path) == ["# Title\n\nprose\n"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_reads_parquet(tmp_path: Path, suffix: str) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"body": TEXTS, "other": [1, 2, 3]}), sink)
    path = compressed(tmp_path / f"a.parquet{suffix}", sink.getvalue().to_pybytes())
    assert texts(path, text_field="body") == sorted(TEXTS)


def test_reads_concatenated_compressed_streams(tmp_path: Path) -> None:
    half = jsonl()
    other = b'{"text": "fourth"}\n'
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(half) + gzip.compress(other))
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(half) + zstandard.compress(other))
    assert texts(tmp_path / "a.jsonl.gz") == sorted([*TEXTS, "fourth\n"])
    assert texts(tmp_path / "b.jsonl.zst") == sorted([*TEXTS, "fourth\n"])


def test_globs_match_each_file_once(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "deep" / "b.txt").write_text("two")
    assert texts(f"{tmp_path}/**/*.txt", tmp_path / "a.txt") == ["one\n", "two\n"]


def test_origin_names_contents_and_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n" + jsonl())
    origins = [document.origin for document in documents(config(tmp_path / "a.jsonl"))]
    assert [origin.split(":")[1] for origin in origins] == ["2", "3", "4"]
    (tmp_path / "a.jsonl").rename(tmp_path / "moved.jsonl")
    assert [document.origin for document in documents(config(tmp_path / "moved.jsonl"))] == origins


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "a"', "line 2: not valid JSON"),
        (b'["text"]', "line 2: a JSON list, not an object"),
        (b'{"tekst": "a"}', "line 2: no field 'text'. Set `text_field`: did you mean 'tekst'?"),
        (b'{"text": 3}', "line 2: field 'text' is a int, not a string"),
        (b'{"text": null}', "line 2: field 'text' is a NoneType, not a string"),
        (b'{"text": "\xff"}', "line 2: not UTF-8 (byte 0xff)"),
    ],
)
def test_malformed_jsonl_names_file_and_line(tmp_path: Path, line: bytes, said: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(InputError) as error:
        texts(path)
    assert f"{path}, {said}" in str(error.value)


def test_half_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud800"}\n')
    with pytest.raises(InputError, match="surrogate"):
        texts(tmp_path / "a.jsonl")


def test_undecodable_text_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"one\ntwo\nth\xe9\n")
    with pytest.raises(InputError, match=r"latin.txt, line 3: not UTF-8 \(byte 0xe9\)"):
        texts(tmp_path / "latin.txt")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_truncated_compression_is_refused(tmp_path: Path, suffix: str) -> None:
    path = compressed(tmp_path / f"a.jsonl{suffix}", os.urandom(2000).hex().encode() + b"\n")
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(InputError, match=f"a.jsonl{suffix}"):
        texts(path, format="text")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.parquet.gz"])
def test_wrong_suffix_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(jsonl())
    with pytest.raises(InputError, match=name):
        texts(tmp_path / name)


def test_parquet_column_must_be_there_and_hold_strings(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"texts": ["a", None], "number": [1, 2]}), path)
    with pytest.raises(InputError, match=r"no column 'text'. Set `text_field`: did you mean 'texts'\?"):
        texts(path)
    with pytest.raises(InputError, match="column 'number' holds int64, not strings"):
        texts(path, text_field="number")
    with pytest.raises(InputError, match="row 2: 'texts' is null"):
        texts(path, text_field="texts")


def test_missing_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        identify(config(tmp_path / "none.txt"))
    with pytest.raises(InputError, match="no file matches"):
        identify(config(f"{tmp_path}/*.txt"))
    with pytest.raises(InputError, match="is a folder"):
        identify(config(tmp_path))


def test_json_needs_a_format(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(jsonl())
    with pytest.raises(InputError, match="Set `format`"):
        texts(tmp_path / "a.json")
    assert texts(tmp_path / "a.json", format="jsonl") == sorted(TEXTS)


def test_identity_is_contents_not_places(tmp_path: Path) -> None:
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{folder}1.txt").write_text("one")
        (tmp_path / folder / f"{folder}2.txt").write_text("two")
    here = identify(config(f"{tmp_path}/here/*.txt"))
    assert here == identify(config(tmp_path / "there/there2.txt", tmp_path / "there/there1.txt"))
    assert here != identify(config(tmp_path / "there/there2.txt"))
    (tmp_path / "here" / "here1.txt").write_text("One")
    assert here != identify(config(f"{tmp_path}/here/*.txt"))
    # Read as another format, the same bytes are other documents.
    (tmp_path / "here" / "here1.txt").write_text("one")
    (tmp_path / "here" / "here2.txt").rename(tmp_path / "here" / "here2.jsonl")
    assert here != identify(config(f"{tmp_path}/here/*"))
