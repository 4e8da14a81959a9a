"""Runs one command and sees to its end: `python -m moestro.inference.supervisor FD COMMAND...`.

FD is the reading end of a pipe whose other end the parent holds. When the parent closes it, or dies in whatever way,
the command gets SIGTERM, and after a grace period everything left in the process group SIGKILL: vLLM's engine is a
child of its server and would outlive it. A pipe and not PR_SET_PDEATHSIG for this first link, because that signal
comes as soon as the *thread* ends which started the child. The link from here to the command is PR_SET_PDEATHSIG,
since this process has one thread and may itself be killed.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys

GRACE_SECONDS = 10
PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel to send this process SIGTERM when the one that started it is gone (prctl(2))."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


def supervise(lifeline: int, command: list[str]) -> int:
    """Run `command` until it ends or the pipe `lifeline` does; returns the command's exit code."""
    child = subprocess.Popen(command, preexec_fn=die_with_parent, stdin=subprocess.DEVNULL)  # noqa: PLW1509
    ended = os.pidfd_open(child.pid)  # readable as soon as the command has ended
    if lifeline in select.select([lifeline, ended], [], [])[0]:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_SECONDS)
        return child.poll() or 0
    return child.wait()


def main() -> None:
    """Entry point: must be the leader of its own process group."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    code = supervise(int(sys.argv[1]), sys.argv[2:])
    if os.getpgid(0) == os.getpid():
        with contextlib.suppress(ProcessLookupError):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            _kill_others()
    sys.exit(code)


def _kill_others() -> None:
    """SIGKILL for every other process of this group; reads /proc, since killpg would hit this process too."""
    own = os.getpid()
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) != own:
            with contextlib.suppress(ProcessLookupError):
                if os.getpgid(int(entry.name)) == own:
                    os.kill(int(entry.name), signal.SIGKILL)


if __name__ == "__main__":
    main()
