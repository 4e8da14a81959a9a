"""Ctrl-C and SIGTERM as the ordinary end of a command that serves."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console


@contextmanager
def until_stopped(console: Console) -> Iterator[None]:
    """Leave the block, in order and without an error, at Ctrl-C or SIGTERM."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except KeyboardInterrupt:
        console.print("stopped")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
