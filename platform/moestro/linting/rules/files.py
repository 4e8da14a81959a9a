"""Rules on a checkpoint's files: whole, and the same ones for both engines."""

import functools
import math
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open

from moestro.errors import InputError
from moestro.linting.checkpoint import Checkpoint, refused
from moestro.linting.draft import Draft
from moestro.linting.rule import Rule, Trouble, counted, some
from moestro.models.files import INDEX, WEIGHTS, check_safetensors, read_json, weight_files

OTHER_WEIGHTS = ("pytorch_model*.bin", "pytorch_model*.bin.index.json")


def _no_safetensors(checkpoint: Checkpoint) -> Iterator[Trouble]:
    folder = checkpoint.folder
    others = {path.name for pattern in OTHER_WEIGHTS for path in folder.glob(pattern)}
    if others and not (folder / WEIGHTS).is_file() and not (folder / INDEX).is_file():
        yield Trouble(
            where=some(others),
            what="The weights are no safetensors: only these are checked.",
            transformers="Loads them; what it makes of them was not checked.",
            vllm="Loads them; what it makes of them was not checked.",
            remedy="Save it with safetensors: load it with transformers and call save_pretrained.",
            affects=(),
        )


NO_SAFETENSORS = Rule(
    name="no-safetensors",
    severity="warning",
    about="Weights are stored as `pytorch_model.bin` alone: nothing was checked.",
    check=_no_safetensors,
    any_architecture=True,
    of_quantised=True,
    final=True,
)


def _damaged(checkpoint: Checkpoint) -> Iterator[Trouble]:
    try:
        paths = weight_files(checkpoint.folder)
    except InputError as error:
        yield _damage(checkpoint.folder, error)
        return
    damaged = False
    for path in paths:
        if refusal := refused(functools.partial(check_safetensors, path)):
            damaged = True
            yield _damage(path, refusal)
    if damaged:
        return
    if refusal := refused(lambda: checkpoint.stored):
        if not checkpoint.quantised:  # some pack weights into types that torch does not have
            yield _damage(checkpoint.folder, refusal)
        return
    for name, tensor in checkpoint.stored.items():
        if tensor.length != math.prod(tensor.shape) * tensor.dtype.itemsize:
            what = f"{tensor.path}: the header gives {name} {tensor.length} bytes for {list(tensor.shape)}."
            yield _damage(tensor.path, InputError(what))


def _damage(path: Path, error: InputError) -> Trouble:
    return Trouble(
        where=(path.name,),
        what=error.message,
        transformers="Raises an error, or fills what is missing with random numbers.",
        vllm="Raises an error, or leaves what is missing uninitialised.",
        remedy=error.hint or "Copy it again from its source.",
    )


DAMAGED_FILES = Rule(
    name="damaged-files",
    severity="error",
    about="Weight files are missing, cut off, of an unknown type, or disagree with their own header.",
    check=_damaged,
    any_architecture=True,
    final=True,
    structural=True,
    of_quantised=True,
)


def _read_by_vllm(folder: Path) -> set[Path]:
    """Without an index vLLM takes every file it finds, and of what is stored twice the last."""
    if (folder / INDEX).is_file():
        return {folder / name for name in set(read_json(folder / INDEX)["weight_map"].values())}
    return set(folder.glob("*.safetensors"))


def _stray(checkpoint: Checkpoint) -> Iterator[Trouble]:
    ours, theirs = set(weight_files(checkpoint.folder)), _read_by_vllm(checkpoint.folder)
    if ours != theirs:
        yield Trouble(
            where=some(path.name for path in ours ^ theirs),
            what="The two engines read different files.",
            transformers=f"Reads {', '.join(some(path.name for path in ours))}.",
            vllm=f"Reads {', '.join(some(path.name for path in theirs))}.",
            remedy="Remove the files, or the index, that do not belong to the checkpoint.",
            affects=("vllm",),
            fixable=True,
        )


def _keep_ours(_checkpoint: Checkpoint, _draft: Draft) -> None:
    """The copy is made of the files that transformers reads."""


STRAY_FILES = Rule(
    name="stray-files",
    severity="error",
    about="Weight files beside those that belong to the checkpoint, which one engine reads and the other does not.",
    check=_stray,
    mend=_keep_ours,
    mends="Only what transformers reads is copied.",
    any_architecture=True,
    of_quantised=True,
)


def _index(checkpoint: Checkpoint) -> Iterator[Trouble]:
    if (checkpoint.folder / WEIGHTS).is_file():
        return
    places: dict[str, list[str]] = {}
    for path in weight_files(checkpoint.folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (a reader, not a mapping)
                places.setdefault(name, []).append(path.name)
    told = read_json(checkpoint.folder / INDEX)["weight_map"]
    wrong = {name for name in places.keys() | told.keys() if places.get(name) != [told.get(name)]}
    if wrong:
        twice = {name for name in wrong if len(places.get(name, [])) > 1}
        yield Trouble(
            where=(INDEX, *some(wrong)),
            what=f"The index is wrong about {counted(len(wrong), 'tensor', 'tensors')}"
            + (f"; stored in several files: {len(twice)}." if twice else "."),
            transformers="Reads whatever the files hold, of what is stored twice the last.",
            vllm="Reads whatever the files hold, of what is stored twice the last.",
            remedy="Write the checkpoint again: other tools trust the index.",
            affects=(),
            fixable=not twice,
        )


INDEX_MISMATCH = Rule(
    name="index-mismatch",
    severity="warning",
    about="The index names tensors that its files do not hold, or the other way round.",
    check=_index,
    mend=_keep_ours,
    mends="The copy gets an index of its own.",
    any_architecture=True,
    of_quantised=True,
)
