"""`DigestedFile`: a new file whose BLAKE3 digest is known as soon as it is written; nothing is read again.

Where the file system can, its bytes go past the page cache: a checkpoint would push out all else that lies there, and
making room for it is slower than the disk. Two threads write and digest while the caller fills the next block.
"""

import errno
import fcntl
import mmap
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from itertools import cycle
from pathlib import Path
from types import TracebackType
from typing import Self

from blake3 import blake3

BLOCK_BYTES = 4 << 20
PART_BYTES = 1 << 20
"""What is inspected at a time: still in the processor's cache, where a whole block is not."""
ALIGNMENT = 4096
"""Direct writes begin and end at multiples of it, in the file and in memory."""


class DigestedFile:
    """A file to be written from its beginning to its end."""

    def __init__(self, path: Path) -> None:
        """Raises `FileExistsError` if there is such a file."""
        self._file = path.open("xb", buffering=0)
        self._direct = _without_page_cache(self._file)
        self._digest = blake3()
        self._writer = ThreadPoolExecutor(max_workers=1)
        self._digester = ThreadPoolExecutor(max_workers=1)
        self._blocks = cycle([_Block() for _ in range(3)])
        self._block = next(self._blocks)

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`. Raises `OSError`, also for what was appended before."""
        left = memoryview(data)
        while left:
            room = self._block.room()[: len(left)]
            room[:] = left[: len(room)]
            left = left[len(room) :]
            self._filled(len(room))

    def copy(self, stream: FileIO, length: int, *, inspect: Callable[[memoryview], None] = lambda _data: None) -> None:
        """Append the next `length` bytes of `stream`, shown to `inspect` part by part before they are written.

        Parts lie between multiples of `PART_BYTES` in the file.
        Raises `EOFError` if there are fewer, and as `inspect` and `write`.
        """
        while length:
            room = left = self._block.room()[: min(length, PART_BYTES - self._block.length % PART_BYTES)]
            while left:
                count = stream.readinto(left)
                if not count:
                    raise EOFError(stream.name)
                left = left[count:]
            inspect(room)
            length -= len(room)
            self._filled(len(room))

    def hexdigest(self) -> str:
        """BLAKE3 of the whole file (hex), which ends here."""
        self._hand_over()
        for _ in range(3):
            self._block.wait()
            self._block = next(self._blocks)
        return self._digest.hexdigest()

    def _filled(self, count: int) -> None:
        self._block.length += count
        if self._block.length == BLOCK_BYTES:
            self._hand_over()

    def _hand_over(self) -> None:
        """Write and digest the block, and go on with one that is free."""
        data = self._block.data()
        self._block.busy = [self._writer.submit(self._write, data), self._digester.submit(self._digest.update, data)]
        self._block = next(self._blocks)
        self._block.wait()

    def _write(self, data: memoryview) -> None:
        while data:
            if self._direct and len(data) % ALIGNMENT:  # the file's end, or after a write that the disk cut short
                flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
                fcntl.fcntl(self._file, fcntl.F_SETFL, flags & ~os.O_DIRECT)
                self._direct = False
            data = data[self._file.write(data) :]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for threads in (self._writer, self._digester):
            threads.shutdown(cancel_futures=True)
        self._file.close()


class _Block:
    """Aligned memory, filled, then written and digested, then free again."""

    def __init__(self) -> None:
        self._memory = memoryview(mmap.mmap(-1, BLOCK_BYTES))
        self.length = 0
        self.busy: list[Future[object]] = []

    def room(self) -> memoryview:
        return self._memory[self.length :]

    def data(self) -> memoryview:
        return self._memory[: self.length]

    def wait(self) -> None:
        """Until it is free; raises what writing it raised."""
        for future in self.busy:
            future.result()
        self.busy, self.length = [], 0


def _without_page_cache(file: FileIO) -> bool:
    """Ask for direct writes; false where the file system has none."""
    if not hasattr(os, "O_DIRECT"):
        return False
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True
