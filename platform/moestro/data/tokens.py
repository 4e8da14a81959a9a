"""The `tokens` stage: a corpus as token ids of a seed's tokenizer, one flat array per side.

Every document ends with the end-of-text token; `*_documents.npy` holds where each begins.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from moestro.artifacts import Artifact, Job
from moestro.config import TokensConfig
from moestro.data.tokenizer import encode, load_tokenizer
from moestro.errors import InputError

CHUNK = 512
# Documents that do not fit are passed over until less than this share of the limit is free.
FULL = 0.01


def tokens(config: TokensConfig, *, corpus: Artifact, seed: Artifact, job: Job) -> dict[str, Any]:
    """Write `train.npy` and `held_out.npy` (uint16, or uint32 for large vocabularies) and the documents' offsets.

    Raises `InputError` for a seed without a tokenizer, and if no document of a side fits its limit.
    """
    tokenizer = load_tokenizer(seed.path)
    limits = {"train": config.max_train_tokens, "held_out": config.max_held_out_tokens}
    sides = {name: _side(name, limit, corpus.path, tokenizer, job) for name, limit in limits.items()}
    for name, side in sides.items():
        np.save(job.out / f"{name}.npy", side.ids)
        np.save(job.out / f"{name}_documents.npy", side.starts)
    train = sides["train"]
    return {
        "tokens": len(train.ids),
        "held_out_tokens": len(sides["held_out"].ids),
        "documents": len(train.starts),
        "bytes_per_token": train.text_bytes / len(train.ids),
    }


class _Side:
    """The documents of one side as they come in."""

    def __init__(self, limit: int, dtype: type[np.unsignedinteger[Any]]) -> None:
        self.limit = limit
        self.dtype = dtype
        self.pieces: list[np.ndarray[Any, Any]] = []
        self.size = self.text_bytes = 0
        self.offsets: list[int] = []

    @property
    def full(self) -> bool:
        return self.limit - self.size < FULL * self.limit

    @property
    def ids(self) -> np.ndarray[Any, Any]:
        return np.concatenate(self.pieces)

    @property
    def starts(self) -> np.ndarray[Any, Any]:
        return np.asarray(self.offsets, dtype=np.int64)

    def add(self, document: list[int], text: str) -> None:
        """Take the document if it fits."""
        if self.size + len(document) <= self.limit:
            self.pieces.append(np.asarray(document, dtype=self.dtype))
            self.offsets.append(self.size)
            self.size += len(document)
            self.text_bytes += len(text.encode())


def _side(name: str, limit: int, corpus: Path, tokenizer: Any, job: Job) -> _Side:
    side = _Side(limit, np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
    path = corpus / f"{name}.parquet"
    if not path.is_file():
        raise InputError(f"{corpus} is not a corpus: it has no {path.name}.")
    done, total = 0, pq.read_metadata(path).num_rows
    for texts in _chunks(path):
        for text, ids in zip(texts, encode(tokenizer, texts), strict=True):
            side.add([*ids, tokenizer.eos_token_id], text)
        done += len(texts)
        job.reporter.progress(done, total, f"{name}: {side.size} tokens")
        if side.full:
            break
    if side.size == 0:
        raise InputError(
            f"No document of {path} fits into {limit} tokens.",
            hint=f"Raise `tokens.max_{name}_tokens`, or divide the text into smaller documents.",
        )
    return side


def _chunks(path: Path) -> Iterator[list[str]]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=CHUNK, columns=["text"]):
            yield batch.column(0).to_pylist()
