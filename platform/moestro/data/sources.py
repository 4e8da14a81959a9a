"""The documents of a domain, wherever they come from, and the identity of what they are read from."""

import hashlib
import importlib.metadata
from collections.abc import Iterator
from dataclasses import replace

from moestro.artifacts import canonical_json
from moestro.config import BuiltinSource, CorpusConfig, FileSource, TaskSource
from moestro.data.builtin import docs, identify_builtin, stdlib
from moestro.data.documents import Document, normalise, place, text_id
from moestro.data.files import file_documents, source_files
from moestro.data.tasks import Task, is_held_out_prompt

BUILTIN = {"stdlib": stdlib, "docs": docs}
SELECTION_SEED = 0


def documents(config: CorpusConfig) -> Iterator[Document]:
    """The domain's documents in normal form, in an order that its contents decide; empty texts included.

    Raises `InputError` for files that are missing or malformed, and for a task with too few distinct problems.
    """
    source = config.domain.source
    if isinstance(source, TaskSource):
        yield from _worked_problems(source, config.split.seed)
    elif isinstance(source, FileSource):
        yield from map(_normal, file_documents(source))
    else:
        yield from _selection(source)


def identify(config: CorpusConfig) -> dict[str, str]:
    """`{domain name: fingerprint}` of what the domain is read from: contents, not places.

    A task's is the version of reasoning-gym, which together with config and seed decides every problem.
    """
    source = config.domain.source
    if isinstance(source, TaskSource):
        contents = ["reasoning-gym", importlib.metadata.version("reasoning-gym")]
    elif isinstance(source, FileSource):
        contents = [f"{file.format} {file.compression or 'plain'} {file.digest}" for file in source_files(source)]
    else:
        contents = [source.name, identify_builtin(source.name)]
    return {config.domain.name: hashlib.sha256(canonical_json(contents).encode()).hexdigest()}


def _normal(document: Document) -> Document:
    return replace(document, text=normalise(document.text, origin=document.origin))


def _selection(source: BuiltinSource) -> Iterator[Document]:
    """Whole documents in a fixed shuffled order, up to the first that would exceed `max_bytes`."""
    everything = [_normal(document) for document in BUILTIN[source.name]()]
    everything.sort(key=lambda document: place(text_id(document.text), SELECTION_SEED))
    room = source.max_bytes
    for document in everything:
        room -= len(document.text.encode())
        if room < 0:
            return
        yield document


def _worked_problems(source: TaskSource, seed: int) -> Iterator[Document]:
    """Distinct problems of both sides, the tasks in equal shares (the first ones take the remainder)."""
    share, remainder = divmod(source.problems, len(source.tasks))
    seen: set[str] = set()
    for position, config in enumerate(source.tasks):
        task = Task.open(config)
        for problem in task.both_sides(share + (position < remainder), seed=seed, seen=seen):
            yield Document(problem.text, f"task:{config.name}", is_held_out_prompt(problem.prompt))
