"""Keeping Ctrl-C for the process that can answer it.

A terminal sends SIGINT to every process in its foreground group. A lifecycle's driver ends its children in order; were
they interrupted on their own at the same moment, it would lose the servers it still has to tell how the run ended.
"""

import signal
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
