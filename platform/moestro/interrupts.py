"""Keeping Ctrl-C and SIGTERM for those who can answer them.

A terminal sends SIGINT to every process in its foreground group. A lifecycle's driver ends its children in order; were
they interrupted on their own at the same moment, it would lose the servers it still has to tell how the run ended.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Children started in the block never see SIGINT; one that arrives meanwhile reaches this thread afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def terminations_kept() -> Iterator[None]:
    """SIGTERM is answered after the block as before: Ray takes it to exit at once, whoever has cleaning up to do."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
