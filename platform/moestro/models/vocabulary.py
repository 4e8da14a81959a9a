"""Vocabularies of which one only adds rows to another's: who knows which rows of embedding and output head.

A tokenizer extends another if it gives the other's ids the same meaning and splits text as the other does, up to
tokens that the other lacks. Beyond the tokenizer's ids an embedding may be padded with rows that mean nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from moestro.artifacts import file_digest
from moestro.errors import InputError
from moestro.models.files import TOKENIZERS, read_json

VOCABULARY_WEIGHTS = ("model.embed_tokens.weight", "lm_head.weight")
"""Weights with a row per token."""
SECTIONS = ("model", "added_tokens", "version", "truncation", "padding")
"""Sections of tokenizer.json that are compared by their parts, or say nothing about what text becomes."""


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary of the result, and what each model, by name, has of it."""

    largest: str
    """The model whose tokenizer becomes everyone's."""
    tokens: Mapping[str, int]
    """Ids of each model's tokenizer."""
    rows: Mapping[str, int]
    """Rows of each model's embedding."""

    @property
    def size(self) -> int:
        """Rows of the result's embedding."""
        return max(self.rows.values())

    def spans(self) -> list[tuple[int, int, tuple[str, ...]]]:
        """The result's rows as consecutive ranges, each with the models that have its rows.

        A row is had by those whose tokenizer knows the token; where it is padding to all, by those that have padding.
        """
        edges = sorted({0, *self.rows.values(), *(count for count in self.tokens.values() if count < self.size)})
        spans: list[tuple[int, int, tuple[str, ...]]] = []
        for start, stop in pairwise(edges):
            stored = tuple(name for name, rows in self.rows.items() if start < rows)
            having = tuple(name for name in stored if start < self.tokens[name]) or stored
            joins = bool(spans) and spans[-1][2] == having
            spans.append((spans.pop()[0] if joins else start, stop, having))
        return spans


@dataclass(frozen=True)
class Clash:
    """Two tokenizers of which neither extends the other."""

    name: str
    other: str
    reasons: tuple[str, ...]


def compare_vocabularies(
    folders: Mapping[str, Path], rows: Mapping[str, int], *, base: str
) -> tuple[Vocabulary, list[Clash]]:
    """The vocabulary that all models could share, and what keeps them from it.

    `folders` and `rows` of embeddings are by name. Everyone is compared with `base`, and, where all go with that, with
    the largest. Among equally large tokenizers that of `base` is taken.
    Raises `InputError` for a tokenizer.json that holds no model.
    """
    digests = {name: _digests(folder) for name, folder in folders.items()}
    alike = len(set(digests.values())) == 1
    if not all(files[0] for files in digests.values()) or (alike and len(set(rows.values())) == 1):
        unlike = {name: _files_that_differ(files, digests[base]) for name, files in digests.items()}
        clashes = [Clash(name, base, found) for name, found in unlike.items() if found]
        return Vocabulary(base, dict(rows), dict(rows)), clashes
    parsed = {files: _Tokenizer.read(folders[name]) for name, files in digests.items()}
    tokenizers = {name: parsed[files] for name, files in digests.items()}
    largest = max(folders, key=lambda name: (tokenizers[name].size, name == base))
    clashes = _clashes(tokenizers, base) or _clashes(tokenizers, largest)
    return Vocabulary(largest, {name: item.size for name, item in tokenizers.items()}, dict(rows)), clashes


def _clashes(tokenizers: Mapping[str, "_Tokenizer"], with_whom: str) -> list[Clash]:
    found = []
    for name, tokenizer in tokenizers.items():
        smaller, larger = sorted((tokenizer, tokenizers[with_whom]), key=lambda item: item.size)
        if reasons := tuple(smaller.differences(larger)):
            found.append(Clash(name, with_whom, reasons))
    return found


def _digests(folder: Path) -> tuple[str | None, ...]:
    return tuple(file_digest(folder / name) if (folder / name).is_file() else None for name in TOKENIZERS)


def _files_that_differ(one: tuple[str | None, ...], other: tuple[str | None, ...]) -> tuple[str, ...]:
    names = [name for name, mine, theirs in zip(TOKENIZERS, one, other, strict=True) if mine != theirs]
    return tuple(f"{name} differs" for name in names)


@dataclass(frozen=True)
class _Tokenizer:
    """What tokenizer.json says, in comparable form."""

    ids: Mapping[str, int]
    """Every token's id, added ones among them."""
    added: Mapping[str, Any]
    """Added tokens and how they are matched."""
    scores: Mapping[str, float]
    """Of pieces, where the model has them."""
    merges: tuple[tuple[str, ...], ...]
    rules: Mapping[str, Any]
    """All else: normaliser, pre-tokenizer, decoder, the model's settings."""

    @classmethod
    def read(cls, folder: Path) -> "_Tokenizer":
        path = folder / TOKENIZERS[0]
        content = read_json(path)
        if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
            raise InputError(f"{path} holds no tokenizer model.", hint="Copy it again from its source.")
        model, scores = dict(content["model"]), {}
        stored = model.pop("vocab", {})
        if isinstance(stored, list):  # pieces with scores, in the order of their ids
            scores = dict(stored)
            stored = {piece: number for number, (piece, _) in enumerate(stored)}
        added = {token["content"]: token for token in content.get("added_tokens") or ()}
        ids = stored | {token: entry["id"] for token, entry in added.items()}
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model.pop("merges", ()))
        rules = {name: section for name, section in content.items() if name not in SECTIONS}
        return cls(ids, added, scores, tuple(tuple(pair) for pair in pairs), rules | {"model": model})

    @property
    def size(self) -> int:
        return 1 + max(self.ids.values(), default=-1)

    def differences(self, larger: "_Tokenizer") -> list[str]:
        """Why `larger` does not extend this one; empty if it does."""
        found = []
        mine = {number: token for token, number in self.ids.items()}
        theirs = {number: token for token, number in larger.ids.items() if number < self.size}
        if moved := sorted(number for number, token in mine.items() if theirs.get(number) != token):
            first = moved[0]
            found.append(f"{len(moved)} ids have another meaning, {first} is {mine[first]!r} or {theirs.get(first)!r}")
        elif len(theirs) > len(mine):
            found.append(f"ids below {self.size} are free in one of them")
        if {token: entry for token, entry in larger.added.items() if token in self.ids} != self.added:
            found.append("added tokens are matched in another way")
        if any(larger.scores.get(piece) != score for piece, score in self.scores.items()):
            found.append("pieces have other scores")
        more = larger.merges[len(self.merges) :]
        if larger.merges[: len(self.merges)] != self.merges or any("".join(pair) in self.ids for pair in more):
            found.append("merges put other tokens together")
        unlike = [
            name
            for name in sorted(self.rules.keys() | larger.rules.keys())
            if self.rules.get(name) != larger.rules.get(name)
        ]
        return found + [f"{name} differs" for name in unlike]
