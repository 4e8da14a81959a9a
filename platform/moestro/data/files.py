"""A user's own files: text (a file is a document), JSONL (a line) and Parquet (a row), plain, .gz or .zst.

What a file is follows from its bytes and how they are read, never from where it lies: files are read in the order
of their digests and a document's origin is `<digest, 12 digits>:<line or row>`.
"""

import difflib
import functools
import glob
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from moestro.artifacts import file_digest
from moestro.config import FileSource
from moestro.data.documents import Document
from moestro.errors import InputError

FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
ROWS = 1024


@dataclass(frozen=True)
class SourceFile:
    """A file, what is in it, and the digest of its bytes."""

    path: Path
    format: str
    compression: str | None
    digest: str


def source_files(source: FileSource) -> list[SourceFile]:
    """The files `source` names, each once, sorted by digest.

    Raises `InputError` for a path that does not exist, cannot be read or is a folder, and a glob without a match.
    """
    paths = sorted({path.resolve() for pattern in source.paths for path in _matches(pattern)})
    return sorted((_source_file(path, source.format) for path in paths), key=lambda file: (file.digest, file.format))


def file_documents(source: FileSource) -> Iterator[Document]:
    """Every document of the files, as it stands there; raises `InputError` with file and line of what is malformed."""
    readers = {"text": _text, "jsonl": _jsonl, "parquet": _parquet}
    for file in source_files(source):
        try:
            for number, text in readers[file.format](file, source.text_field):
                yield Document(text, f"{file.digest[:12]}:{number}")
        except (EOFError, OSError) as error:
            raise InputError(
                f"{file.path}: cannot be read as {file.compression or file.format}: {error}.",
                hint="The file may be truncated, or its suffix may not say what it is.",
            ) from None


def _matches(pattern: str) -> list[Path]:
    pattern = str(Path(pattern).expanduser())
    path = Path(pattern)
    if path.is_dir():
        raise InputError(f"{pattern} is a folder.", hint=f"Name its files, e.g. {pattern}/**/*.txt.")
    if path.exists():
        return [path]
    if not glob.has_magic(pattern):
        raise InputError(f"{pattern}: no such file.", hint="Paths are relative to the current folder.")
    names = glob.glob(pattern, recursive=True)  # noqa: PTH207  (Path.glob takes no absolute pattern)
    found = [Path(name) for name in names if not Path(name).is_dir()]
    if not found:
        raise InputError(f"{pattern}: no file matches.", hint="Globs are relative to the current folder.")
    return found


def _source_file(path: Path, chosen: str) -> SourceFile:
    compression = COMPRESSIONS.get(path.suffix.lower())
    suffix = Path(path.stem).suffix.lower() if compression else path.suffix.lower()
    if chosen == "auto" and suffix == ".json":
        raise InputError(f"{path}: a .json file may be one value or lines.", hint="Set `format` to jsonl or text.")
    try:
        status = path.stat()
        digest = _digest(path, status.st_size, status.st_mtime_ns)
    except PermissionError:
        raise InputError(f"{path}: no permission to read it.") from None
    return SourceFile(path, FORMATS.get(suffix, "text") if chosen == "auto" else chosen, compression, digest)


@functools.lru_cache(maxsize=4096)
def _digest(path: Path, size: int, modified_ns: int) -> str:  # noqa: ARG001  (the key says when to hash again)
    return file_digest(path)


def _open(file: SourceFile) -> IO[bytes]:
    """A stream of the file's bytes, decompressed. (Unlike zstandard's reader, Arrow's fails on a truncated file.)"""
    import pyarrow as pa

    if file.compression is None:
        return file.path.open("rb")
    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(file.path)), file.compression))


def _decode(content: bytes, file: SourceFile, line: int) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        raise InputError(
            f"{file.path}, line {line}: not UTF-8 (byte 0x{content[error.start]:02x}).",
            hint="Convert the file to UTF-8, or set `format` if it is not text.",
        ) from None


def _text(file: SourceFile, _field: str) -> Iterator[tuple[int, str]]:
    with _open(file) as stream:
        yield 1, _decode(stream.read(), file, 1)


def _jsonl(file: SourceFile, field: str) -> Iterator[tuple[int, str]]:
    with _open(file) as stream:
        for number, line in enumerate(stream, 1):
            if content := _decode(line, file, number).strip():
                yield number, _field_of(content, field, f"{file.path}, line {number}")


def _field_of(content: str, field: str, where: str) -> str:
    try:
        value: Any = json.loads(content)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid JSON: {error.msg} at column {error.colno}.") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: a JSON {type(value).__name__}, not an object.")
    if field not in value:
        raise InputError(f"{where}: no field {field!r}.", hint=_nearest(field, list(value)))
    if not isinstance(value[field], str):
        raise InputError(f"{where}: field {field!r} is a {type(value[field]).__name__}, not a string.")
    return value[field]


def _parquet(file: SourceFile, field: str) -> Iterator[tuple[int, str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with _open(file) as stream:
            table = pq.ParquetFile(io.BytesIO(stream.read()) if file.compression else stream)
            _check_column(table.schema_arrow, field, file.path)
            number = 0
            for batch in table.iter_batches(batch_size=ROWS, columns=[field]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    if value is None:
                        raise InputError(f"{file.path}, row {number}: {field!r} is null.")
                    yield number, value
    except pa.ArrowInvalid as error:
        raise InputError(f"{file.path}: not a readable Parquet file: {str(error).splitlines()[0]}") from None


def _check_column(schema: Any, field: str, path: Path) -> None:
    import pyarrow as pa

    if field not in schema.names:
        raise InputError(f"{path}: no column {field!r}.", hint=_nearest(field, schema.names))
    kind = schema.field(field).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise InputError(f"{path}: column {field!r} holds {kind}, not strings.")


def _nearest(field: str, names: list[str]) -> str:
    near = difflib.get_close_matches(field, names, n=1)
    found = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(names)[:8]) or 'none'}."
    return f"Set `text_field`: {found}"
