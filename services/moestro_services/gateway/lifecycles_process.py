"""`ProcessMark`: a process that is known again by whoever looks later, and never taken for another of its number.

A number alone may be given to another process; with the clock tick at which it began, and the boot, it is its own.
"""

import os
import signal
from contextlib import suppress
from pathlib import Path

from moestro.config import Config

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
ENDED_STATES = {"Z", "X"}


class ProcessMark(Config):
    """One process of this machine, since its last boot."""

    pid: int
    """Its number."""
    ticks: int
    """Clock ticks from the boot to its beginning."""
    boot: str
    """The boot's id."""

    @classmethod
    def of(cls, pid: int) -> "ProcessMark":
        """The mark of a process that exists; raises `ProcessLookupError` if it does not."""
        found = _stat(pid)
        if found is None:
            raise ProcessLookupError(f"There is no process {pid}.")
        return cls(pid=pid, ticks=found[1], boot=_boot())

    def running(self) -> bool:
        """Whether it has not ended."""
        found = _stat(self.pid) if self.boot == _boot() else None
        return found is not None and found[1] == self.ticks and found[0] not in ENDED_STATES

    def open(self) -> int | None:
        """A descriptor of it, readable as soon as it has ended, for the caller to close; None if it has ended."""
        with suppress(ProcessLookupError):
            handle = os.pidfd_open(self.pid)
            if self.running():  # asked now, the descriptor is of this process and of no later one
                return handle
            os.close(handle)
        return None

    def interrupt(self) -> bool:
        """Send it SIGINT, as Ctrl-C does; whether it was there to get it."""
        handle = self.open()
        if handle is None:
            return False
        try:
            signal.pidfd_send_signal(handle, signal.SIGINT)
        except ProcessLookupError:
            return False
        finally:
            os.close(handle)
        return True


def _boot() -> str:
    return BOOT_ID.read_text().strip()


def _stat(pid: int) -> tuple[str, int] | None:
    """State and starting tick of a process; its name, in brackets before them, may contain anything."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return fields[0], int(fields[19])
