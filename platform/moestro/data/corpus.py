"""The `corpus` stage: a domain's documents, normalised, without duplicates, split and shuffled, as two Parquet files.

A document's side and its place in the shuffle depend on its text alone (and the seed), never on its neighbours, so
that more documents leave the old ones where they were. Texts wait in a spool file: memory holds an index only.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from moestro.artifacts import Job
from moestro.config import CorpusConfig
from moestro.data.documents import is_held_out, place, text_id
from moestro.data.sources import documents
from moestro.errors import InputError

SCHEMA = pa.schema([("id", pa.string()), ("origin", pa.string()), ("text", pa.string())])
ROW_GROUP = 1024


def corpus(config: CorpusConfig, *, job: Job) -> dict[str, Any]:
    """Write `train.parquet` and `held_out.parquet` (columns id, origin, text) of the domain.

    Raises `InputError` if the domain is empty, has fewer documents than `split.min_documents`, or has none for a side.
    """
    with tempfile.TemporaryFile(dir=job.scratch) as spool:
        collection = _collect(config, spool)
        _check(config, collection)
        job.reporter.progress(1, 3, f"{config.domain.name}: collected {len(collection.seen)} documents")
        sides = {False: "train", True: "held_out"}
        for step, (held_out, name) in enumerate(sides.items(), 2):
            entries = [entry for entry in collection.entries if entry.held_out is held_out]
            entries.sort(key=lambda entry: place(entry.identity, config.split.seed))
            _write(job.out / f"{name}.parquet", entries, spool)
            job.reporter.progress(step, 3, f"{config.domain.name}: wrote {name}.parquet")
    training, held_out_entries = collection.side(held_out=False), collection.side(held_out=True)
    return {
        "documents": len(training),
        "held_out_documents": len(held_out_entries),
        "bytes": sum(entry.length for entry in training),
        "held_out_bytes": sum(entry.length for entry in held_out_entries),
        "duplicates": collection.duplicates,
    }


@dataclass(frozen=True, slots=True)
class _Entry:
    """A document in the spool."""

    identity: str
    origin: str
    held_out: bool
    start: int
    length: int


@dataclass
class _Collection:
    entries: list[_Entry] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    duplicates: int = 0
    empty: int = 0

    def side(self, *, held_out: bool) -> list[_Entry]:
        return [entry for entry in self.entries if entry.held_out is held_out]


def _collect(config: CorpusConfig, spool: IO[bytes]) -> _Collection:
    collection = _Collection()
    for document in documents(config):
        if not document.text:
            collection.empty += 1
            continue
        identity = text_id(document.text)
        if identity in collection.seen:
            collection.duplicates += 1
            continue
        collection.seen.add(identity)
        held_out = document.held_out
        if held_out is None:
            held_out = is_held_out(identity, config.split.held_out_fraction)
        start = spool.tell()
        length = spool.write(document.text.encode())
        collection.entries.append(_Entry(identity, document.origin, held_out, start, length))
    return collection


def _check(config: CorpusConfig, collection: _Collection) -> None:
    name, split, found = config.domain.name, config.split, len(collection.entries)
    dropped = f"(dropped: {collection.empty} empty, {collection.duplicates} duplicates)"
    if found == 0:
        raise InputError(
            f"Domain {name!r} has no text {dropped}.",
            hint="Check its source; for a built-in one, raise `max_bytes`.",
        )
    if found < split.min_documents:
        raise InputError(
            f"Domain {name!r} has {found} documents {dropped}; at least {split.min_documents} are wanted.",
            hint="Add text, divide it into more documents (JSONL: one a line), or lower `split.min_documents`.",
        )
    held_out = {entry.identity for entry in collection.side(held_out=True)}
    training = {entry.identity for entry in collection.side(held_out=False)}
    if not held_out or not training:
        raise InputError(
            f"Domain {name!r} has no {'training' if held_out else 'held-out'} document among its {found}.",
            hint=f"Add documents, or {'lower' if held_out else 'raise'} `split.held_out_fraction` "
            f"({split.held_out_fraction}).",
        )
    assert not held_out & training, "a document stands on both sides of the split"


def _write(path: Path, entries: list[_Entry], spool: IO[bytes]) -> None:
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        for start in range(0, len(entries), ROW_GROUP):
            writer.write_table(pa.Table.from_pylist(list(_rows(entries[start : start + ROW_GROUP], spool)), SCHEMA))


def _rows(entries: list[_Entry], spool: IO[bytes]) -> Iterator[dict[str, str]]:
    for entry in entries:
        spool.seek(entry.start)
        text = spool.read(entry.length).decode()
        yield {"id": entry.identity, "origin": entry.origin, "text": text}
