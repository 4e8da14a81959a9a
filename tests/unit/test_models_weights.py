"""Weights as they are read and written: the library's own layout, the same bytes whatever the shards, little memory."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moestro.artifacts.digested import PART_BYTES
from moestro.errors import InputError
from moestro.models.files import INDEX, WEIGHTS, check_safetensors, weight_files
from moestro.models.finiteness import is_finite
from moestro.models.weights import CODES, DTYPES, NewTensor, StoredWeights, write_weights


def some_tensors() -> dict[str, torch.Tensor]:
    """Several types and shapes, and names whose order is not that of their numbers."""
    generator = torch.Generator().manual_seed(0)
    return {
        "model.layers.10.mlp.down_proj.weight": torch.randn(6, 4, generator=generator),
        "model.layers.2.mlp.down_proj.weight": torch.randn(5, 4, generator=generator),
        "model.norm.weight": torch.randn(7, generator=generator).bfloat16(),
        "gate.e_score_correction_bias": torch.randn(3, generator=generator),
        "counts": torch.arange(11),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "é ": torch.randn(2, 3, 4, generator=generator).half(),
    }


def made(tensor: torch.Tensor, rows: int = 2) -> NewTensor:
    """`tensor`, to be written in blocks of some rows."""

    def blocks() -> Iterator[torch.Tensor]:
        yield from tensor.split(rows) if tensor.dim() and len(tensor) else (tensor,)

    return NewTensor(tensor.dtype, tuple(tensor.shape), blocks)


def write(folder: Path, tensors: dict[str, NewTensor], max_shard_bytes: int = 1 << 40) -> Path:
    folder.mkdir()
    write_weights(folder, tensors, max_shard_bytes=max_shard_bytes)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    save_file(some_tensors(), folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def test_a_file_is_the_one_that_the_library_writes(source: Path, tmp_path: Path) -> None:
    written = write(tmp_path / "made", {name: made(tensor) for name, tensor in some_tensors().items()})
    assert (written / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes()
    copied = write(tmp_path / "copied", {name: NewTensor.copy(item) for name, item in StoredWeights(source).items()})
    assert (copied / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes()


def test_all_types_lie_in_the_librarys_order(tmp_path: Path) -> None:
    tensors = {
        f"{number}": torch.arange(12).to(torch.uint8).view(dtype) if dtype is not torch.bool else torch.ones(3).bool()
        for number, dtype in enumerate(DTYPES.values())
        if dtype.itemsize <= 4
    } | {"wide": torch.arange(3), "wider": torch.arange(3).double(), "no sign": torch.arange(3).to(torch.uint64)}
    assert {tensor.dtype for tensor in tensors.values()} == set(CODES)
    written = write(tmp_path / "made", {name: made(tensor) for name, tensor in tensors.items()})
    save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
    assert (written / WEIGHTS).read_bytes() == (tmp_path / "expected").read_bytes()
    for name, tensor in tensors.items():
        read = StoredWeights(written)[name].read()
        assert read.dtype == tensor.dtype
        assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("limit", [1, 40, 100, 150, 1000])
def test_tensors_do_not_depend_on_the_size_of_shards(limit: int, source: Path, tmp_path: Path) -> None:
    tensors = some_tensors()
    folder = write(tmp_path / "out", {name: made(tensor) for name, tensor in tensors.items()}, max_shard_bytes=limit)
    files = weight_files(folder)
    read = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    for path in files:
        check_safetensors(path)
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            sizes = [tensors[name].nbytes for name in file.keys()]  # noqa: SIM118  (a reader, not a mapping)
        assert sum(sizes) <= limit or sum(size > 0 for size in sizes) == 1
    stored = StoredWeights(folder)
    assert all(torch.equal(stored[name].read(), tensors[name]) for name in tensors)
    if len(files) == 1:
        assert not (folder / INDEX).exists()
        assert files[0].read_bytes() == (source / WEIGHTS).read_bytes()
    else:
        index = json.loads((folder / INDEX).read_text())
        assert index["weight_map"] == {name: stored[name].path.name for name in sorted(tensors)}
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        assert sorted({path.name for path in folder.glob("*.safetensors")}) == [path.name for path in files]


def test_rows_are_read_without_the_rest(source: Path) -> None:
    stored = StoredWeights(source)
    weight = some_tensors()["model.layers.10.mlp.down_proj.weight"]
    item = stored["model.layers.10.mlp.down_proj.weight"]
    assert (item.shape, item.dtype) == ((6, 4), torch.float32)
    for start, stop in ((0, 6), (2, 5), (5, 6), (3, 3)):
        assert torch.equal(item.rows(start, stop), weight[start:stop])
    assert stored["empty"].read().shape == (0, 4)
    assert stored["scalar"].read() == 2.5
    copy = item.read()
    copy.zero_()
    assert torch.equal(item.read(), weight)


def test_what_is_missing_or_cut_off_is_named(source: Path, tmp_path: Path) -> None:
    stored = StoredWeights(source)
    with pytest.raises(InputError, match=r"source lacks model\.layers\.3"):
        stored["model.layers.3.mlp.down_proj.weight"]
    last = max(stored.values(), key=lambda item: item.start + item.length)
    path = source / WEIGHTS
    path.write_bytes(path.read_bytes()[: last.start + 1])
    with pytest.raises(InputError, match=r"model\.safetensors ends too early"):
        last.read()
    with pytest.raises(InputError, match=r"model\.safetensors ends too early"):
        write(tmp_path / "out", {"copied": NewTensor.copy(last)})


def test_an_unknown_type_is_named(tmp_path: Path) -> None:
    save_file({"wave": torch.zeros(2, dtype=torch.complex64)}, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match="wave has the unknown type C64"):
        StoredWeights(tmp_path)


@pytest.mark.parametrize("wrong", [torch.zeros(3, 4).half(), torch.zeros(3, 5), torch.zeros(2, 4), torch.zeros(4, 4)])
def test_a_tensor_other_than_announced_is_refused(wrong: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"router came (as|with)"):
        write(tmp_path / "out", {"router": NewTensor(torch.float32, (3, 4), lambda: iter((wrong,)))})


FLOATS = [dtype for dtype in DTYPES.values() if dtype.is_floating_point]


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_not_finite_is_told_from_bytes(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(1000, generator=generator, dtype=torch.float64)
    numbers[:4] = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min, 0.0, -0.0], dtype=torch.float64)

    def told(numbers: torch.Tensor) -> bool:
        array: Any = numbers.to(dtype).view(torch.uint8).numpy()
        return is_finite(memoryview(array), dtype)

    assert told(numbers)
    assert told(numbers[:0])
    assert told(-numbers.abs())
    for value in (float("nan"), *((float("inf"), -float("inf")) if dtype != torch.float8_e4m3fn else ())):
        for sign in (1, -1):
            broken = numbers.clone()
            broken[-1] = sign * value
            assert not told(broken), value
            assert not told(broken.abs()), value
            assert not told(-broken.abs()), value
    for other in (torch.int32, torch.uint8):
        assert is_finite(memoryview(b"\xff" * 16), other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_copies_of_finite_weights_refuse_others_wherever_they_lie(dtype: torch.dtype, tmp_path: Path) -> None:
    """In the first or the last entry, or around the end of a part; and the last tensor begins within one."""
    source = tmp_path / "source"
    source.mkdir()
    count = 3 * PART_BYTES // dtype.itemsize // 2 + 1
    weights = {"a": torch.ones(count, dtype=dtype), "b": torch.ones(count, dtype=dtype), "n": torch.full((3,), -1)}
    border = PART_BYTES // dtype.itemsize
    for number, (name, place) in enumerate([("b", 0), ("b", count - 1), ("a", border - 40), ("a", border), ("a", 0)]):
        save_file(weights, source / WEIGHTS, metadata={"format": "pt"})
        tensors = {key: NewTensor.copy(item) for key, item in StoredWeights(source, finite=True).items()}
        assert (write(tmp_path / f"{number}", tensors) / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes()
        weights[name][place] = torch.nan
        save_file(weights, source / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(InputError, match=f"source: {name} holds NaN or infinity"):
            write(tmp_path / f"{number} bad", tensors)
        excepted = {key: NewTensor.copy(item) for key, item in StoredWeights(source, finite=True, but=[name]).items()}
        write(tmp_path / f"{number} excepted", excepted)
        weights[name][place] = 1.0


def test_progress_counts_bytes(source: Path, tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    tensors = {name: made(tensor) for name, tensor in some_tensors().items()}
    (tmp_path / "out").mkdir()
    write_weights(
        tmp_path / "out", tensors, max_shard_bytes=64, progress=lambda done, total: heard.append((done, total))
    )
    total = sum(tensor.size for tensor in tensors.values())
    assert [figures[1] for figures in heard] == [total] * len(tensors)
    assert heard == sorted(heard)
    assert heard[-1] == (total, total)


PEAK = """
import json, resource, sys
from pathlib import Path
import torch
from moestro.models.weights import NewTensor, StoredWeights, write_weights

folder = Path(sys.argv[1])
stored = StoredWeights(folder)["weight"]
held, hoard = [], []

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

def in_blocks():
    for start in range(0, stored.shape[0], 256):
        yield stored.rows(start, start + 256) * 2

def whole():
    yield stored.read() * 2

def hoarded():
    hoard.append(stored.read() * 2)
    yield hoard[-1]

def taken(source, count):
    before = peak()
    while peak() == before:  # what was used once and given back would hide what comes
        held.append(b"x" * (1 << 20))
    before = peak()
    out = folder / f"{len(list(folder.iterdir()))}"
    out.mkdir()
    tensors = {f"copy{number}": NewTensor(stored.dtype, stored.shape, source) for number in range(count)}
    write_weights(out, tensors, max_shard_bytes=1 << 40)
    return peak() - before

ways = {"copied": stored, "in_blocks": in_blocks, "whole": whole, "hoarded": hoarded}
print(json.dumps({name: [taken(source, 1), taken(source, 8)] for name, source in ways.items()}))
"""
"""Peaks are a child's own: those of this process would be all other tests'."""


def test_memory_does_not_grow_with_the_number_of_tensors(tmp_path: Path) -> None:
    tensor = torch.zeros(8192, 1024)  # 32 MiB
    save_file({"weight": tensor}, tmp_path / WEIGHTS)
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    child = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    taken = {name: [figure / tensor.nbytes for figure in figures] for name, figures in json.loads(child.stdout).items()}
    bounds = {"copied": 0.5, "in_blocks": 1.5, "whole": 4.5}  # a tensor is read, multiplied, and freed when it is
    assert taken["hoarded"][1] > 7, "the measure does not see what is kept"
    assert all(figure < bound for name, bound in bounds.items() for figure in taken[name]), taken
