"""Weights as they lie in a checkpoint: read one at a time, and written as a stream, never a whole model in memory.

`StoredWeights` knows every tensor of a checkpoint from the headers of its files. `write_weights` takes the name,
type and shape of every tensor beforehand, writes each file's header, and then has the tensors made one after the
other, so that its peak memory is that of the largest one. Files are laid out as the safetensors library lays them
out: saving a loaded checkpoint again gives the same bytes.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moestro.artifacts import DigestedFile
from moestro.errors import InputError
from moestro.models.files import HEADER_LENGTH, INDEX, WEIGHTS, weight_files
from moestro.models.finiteness import is_finite

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
LAYOUT_ORDER = (
    *("U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    *("F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"),
)
"""Order of types within a file, that of the safetensors library: widest first, so that all are aligned."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: where its bytes are. Reading and copying raise `InputError` for a file that was cut off."""

    path: Path
    code: str
    shape: tuple[int, ...]
    start: int
    length: int
    name: str
    finite: bool = False
    """Whether reading and copying it also raise `InputError` for NaN and infinity."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of its elements."""
        return DTYPES[self.code]

    def read(self) -> Tensor:
        """A copy in memory; nothing of the file stays mapped."""
        return self.rows(0, self.shape[0]) if self.shape else self._read(self.start, self.length, ())

    def rows(self, start: int, stop: int) -> Tensor:
        """A copy of entries `start` to `stop` of the first axis."""
        width = self.length // self.shape[0] if self.shape[0] else 0
        return self._read(self.start + start * width, (stop - start) * width, (stop - start, *self.shape[1:]))

    def _read(self, start: int, length: int, shape: tuple[int, ...]) -> Tensor:
        if not length:
            return torch.empty(shape, dtype=self.dtype)
        buffer = torch.empty(length, dtype=torch.uint8)
        with self.path.open("rb", buffering=0) as stream:
            stream.seek(start)
            _fill(_bytes(buffer), stream)
        self.check(_bytes(buffer))
        return buffer.view(self.dtype).reshape(shape)

    def check(self, data: memoryview) -> None:
        """Raise `InputError` if some of its entries, whose bytes are `data`, are not as `finite` asks for."""
        if self.finite and not is_finite(data, self.dtype):
            raise InputError(
                f"{self.path.parent}: {self.name} holds NaN or infinity.",
                hint="Go back to an earlier checkpoint, or copy this one again from its source.",
            )


class StoredWeights(Mapping[str, StoredTensor]):
    """All tensors of a checkpoint folder by name, known from the files' headers."""

    def __init__(self, folder: Path, *, finite: bool = False, but: Collection[str] = ()) -> None:
        """`finite`: reading and copying raise `InputError` for NaN and infinity, except in the tensors `but`.

        Raises `InputError` for a missing file or a type of weights that is not known.
        """
        self.folder = folder
        self._tensors: dict[str, StoredTensor] = {}
        for path in weight_files(folder):
            self._tensors.update(_stored(path))
        if finite:
            self._tensors = {name: replace(tensor, finite=name not in but) for name, tensor in self._tensors.items()}

    def __getitem__(self, name: str) -> StoredTensor:
        if name not in self._tensors:
            raise InputError(f"{self.folder} lacks {name}.", hint="Copy the checkpoint again from its source.")
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _stored(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    with path.open("rb") as stream:
        (length,) = HEADER_LENGTH.unpack(stream.read(HEADER_LENGTH.size))
        header = json.loads(stream.read(length))
    data = HEADER_LENGTH.size + length
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise InputError(f"{path}: {name} has the unknown type {entry['dtype']}.", hint="Convert the checkpoint.")
        start, stop = entry["data_offsets"]
        yield name, StoredTensor(path, entry["dtype"], tuple(entry["shape"]), data + start, stop - start, name)


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written: its type and shape, and where it comes from when its turn has come."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    source: StoredTensor | Callable[[], Iterator[Tensor]]
    """A stored tensor of that type whose bytes are copied unread, or a function that makes it, block by block: the
    blocks follow one another along the first axis."""

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The whole tensor in memory."""
        return self.source.read() if isinstance(self.source, StoredTensor) else torch.cat(list(self.source()))

    @classmethod
    def copy(cls, stored: StoredTensor) -> "NewTensor":
        """The same bytes again."""
        return cls(stored.dtype, stored.shape, stored)

    @classmethod
    def zeros(cls, shape: tuple[int, ...], dtype: torch.dtype) -> "NewTensor":
        """Zeros."""
        return cls(dtype, shape, lambda: iter((torch.zeros(shape, dtype=dtype),)))


def write_weights(
    out: Path,
    tensors: Mapping[str, NewTensor],
    *,
    max_shard_bytes: int,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> dict[str, str]:
    """Write `tensors` into the folder `out`, as one file or, beyond `max_shard_bytes`, as shards with an index.

    A tensor's bytes do not depend on how many shards there are. `progress` is told bytes written and bytes in all.
    Returns the BLAKE3 of each weight file, taken while it was written.
    Raises `ValueError` if a made tensor is not of the announced type and shape.
    """
    ordered = sorted(tensors.items(), key=lambda item: (LAYOUT_ORDER.index(CODES[item[1].dtype]), item[0]))
    shards = _shards(ordered, max_shard_bytes)
    total = sum(tensor.size for tensor in tensors.values())
    names = [WEIGHTS] if len(shards) == 1 else [_shard_name(number, len(shards)) for number in range(len(shards))]
    done, digests = 0, {}
    for name, shard in zip(names, shards, strict=True):
        with DigestedFile(out / name) as file:
            file.write(_header(shard))
            for key, tensor in shard:
                _write(file, key, tensor)
                done += tensor.size
                progress(done, total)
            digests[name] = file.hexdigest()
    if len(shards) > 1:
        elements = sum(prod(tensor.shape) for tensor in tensors.values())
        places = {key: name for name, shard in zip(names, shards, strict=True) for key, _ in shard}
        sizes = {"total_parameters": elements, "total_size": total}
        index = {"metadata": sizes, "weight_map": dict(sorted(places.items()))}
        (out / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return digests


def _shards(ordered: list[tuple[str, NewTensor]], limit: int) -> list[list[tuple[str, NewTensor]]]:
    shards: list[list[tuple[str, NewTensor]]] = [[]]
    size = 0
    for name, tensor in ordered:
        if shards[-1] and size + tensor.size > limit:
            shards.append([])
            size = 0
        shards[-1].append((name, tensor))
        size += tensor.size
    return shards


def _shard_name(number: int, count: int) -> str:
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _header(shard: list[tuple[str, NewTensor]]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in shard:
        offsets = [offset, offset + tensor.size]
        entries[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        offset += tensor.size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return HEADER_LENGTH.pack(len(text)) + text


def _write(file: DigestedFile, name: str, tensor: NewTensor) -> None:
    if isinstance(tensor.source, StoredTensor):
        _copy(tensor.source, file)
        return
    written = 0
    for block in tensor.source():
        if block.dtype != tensor.dtype or tuple(block.shape[1:]) != tensor.shape[1:]:
            what = f"{block.dtype} {list(block.shape)}, not {tensor.dtype} {list(tensor.shape)}"
            raise ValueError(f"{name} came as {what}")
        view = _bytes(block.contiguous().reshape(-1).view(torch.uint8))
        written += len(view)
        file.write(view)
        del block, view  # memory for the next one
    if written != tensor.size:
        raise ValueError(f"{name} came with {written} bytes, not {tensor.size}")


def _copy(stored: StoredTensor, file: DigestedFile) -> None:
    with stored.path.open("rb", buffering=0) as stream:
        stream.seek(stored.start)
        try:
            file.copy(stream, stored.length, inspect=stored.check)
        except EOFError:
            raise _too_short(stored.path) from None


def check_fits(tensor: Tensor, what: str) -> Tensor:
    """`tensor`, which was made of finite weights; raises `InputError` if its type is too narrow for one of its entries.

    `what` says what it is, with its sources.
    """
    if not is_finite(_bytes(tensor.contiguous().reshape(-1).view(torch.uint8)), tensor.dtype):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise InputError(f"{what} would hold NaN or infinity in {kind}.", hint="Store it in a wider type.")
    return tensor


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a uint8 tensor [N]."""
    array: Any = tensor.numpy()
    return memoryview(array)


def _fill(view: memoryview, stream: FileIO) -> None:
    while view:
        count = stream.readinto(view)
        if not count:
            raise _too_short(stream.name)
        view = view[count:]


def _too_short(path: object) -> InputError:
    return InputError(f"{path} ends too early.", hint="Copy it again from its source.")
