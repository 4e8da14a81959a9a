"""Files that are digested while they are written: the digest is that of the bytes on the disk, however they came."""

import threading
from itertools import cycle
from pathlib import Path

import pytest
import torch
from blake3 import blake3

from moestro.artifacts import DigestedFile, digest_files, file_digest
from moestro.models.weights import NewTensor, StoredWeights, write_weights


def test_the_digest_is_that_of_the_file(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(100_000, (200,), generator=generator).tolist()
    buffers = cycle((bytearray(100_000), bytearray(100_000)))
    with DigestedFile(tmp_path / "file") as file:
        file.write(b"")
        for size in sizes:  # each buffer is filled again as soon as it may be
            view = memoryview(next(buffers))[:size]
            view[:] = torch.randint(256, (size,), generator=generator, dtype=torch.uint8).numpy().tobytes()
            file.write(view)
        digest = file.hexdigest()
    assert digest == blake3((tmp_path / "file").read_bytes()).hexdigest()
    assert (tmp_path / "file").stat().st_size == sum(sizes)


def test_an_empty_file_has_a_digest(tmp_path: Path) -> None:
    with DigestedFile(tmp_path / "file") as file:
        assert file.hexdigest() == blake3().hexdigest()


def test_a_file_that_exists_is_left_alone_and_no_thread_stays(tmp_path: Path) -> None:
    threads = threading.active_count()
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        DigestedFile(tmp_path / "file")
    with pytest.raises(TypeError), DigestedFile(tmp_path / "other") as file:
        file.write("no bytes")  # type: ignore[arg-type]
    assert (tmp_path / "file").read_bytes() == b"mine"
    assert threading.active_count() == threads


def test_weights_come_with_their_digests(tmp_path: Path) -> None:
    made = {f"w{number}": torch.randn(40, 30, generator=torch.Generator().manual_seed(number)) for number in range(6)}
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    new = {
        name: NewTensor(item.dtype, tuple(item.shape), lambda item=item: iter((item,))) for name, item in made.items()
    }
    assert write_weights(first, new, max_shard_bytes=1 << 30) == digests(first)
    copies = {name: NewTensor.copy(item) for name, item in StoredWeights(first).items()}
    assert write_weights(second, copies, max_shard_bytes=10_000) == digests(second)
    assert len(digests(second)) == 3


def digests(folder: Path) -> dict[str, str]:
    return {path.name: file_digest(path) for path in folder.glob("*.safetensors")}


def test_known_digests_are_taken_and_all_others_made(tmp_path: Path) -> None:
    (tmp_path / "known").write_bytes(b"a")
    (tmp_path / "unknown").write_bytes(b"b")
    entries = digest_files(tmp_path, {"known": "0" * 64})
    assert entries["known"].blake3 == "0" * 64
    assert entries["unknown"].blake3 == blake3(b"b").hexdigest()
    assert {entry.size for entry in entries.values()} == {1}
