"""Signals are kept for those who can answer them."""

import signal
from typing import Any

from moestro.interrupts import terminations_kept


def test_a_handler_that_a_library_installs_does_not_stay() -> None:
    def ours(*_: Any) -> None: ...

    before = signal.signal(signal.SIGTERM, ours)
    try:
        with terminations_kept():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)
