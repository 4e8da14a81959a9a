"""What a server's processes hold, and the machine they run on."""

import os
import platform
from pathlib import Path

import psutil

from moestro.errors import ResourceError

CPU_INFO = Path("/proc/cpuinfo")


def peak_memory(port: int) -> int:
    """Peak resident memory, bytes, of this process's descendant that listens on `port` and of its process group.

    Each process counts with its own peak (VmHWM of proc(5)), so the sum is an upper bound: pages that two share count
    twice, and they need not have peaked together. Raises `ResourceError` if nothing of ours listens there.
    """
    for process in psutil.Process().children(recursive=True):
        try:
            listens = any(
                item.laddr and item.laddr.port == port and item.status == psutil.CONN_LISTEN
                for item in process.net_connections(kind="tcp")
            )
        except psutil.Error:
            continue
        if listens:
            return _peak_of_group(os.getpgid(process.pid))
    raise ResourceError(f"No process of this one listens on port {port}.", hint="The server ended while it was asked.")


def _peak_of_group(group: int) -> int:
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group:
                found.append(_peak(process.pid))
        except ProcessLookupError:
            continue
    return sum(found)


def _peak(pid: int) -> int:
    """Highest resident set of a process, bytes; 0 for one that has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    sizes = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return 1024 * sum(sizes)


def machine(threads: int | None) -> str:
    """What times on this machine can be compared with: architecture, processor, cores, memory, accelerators, threads.

    Without a number of `threads` a server uses all that this process may use.
    It names no host: two machines of one kind are one.
    """
    models = [line.partition(":")[2].strip() for line in CPU_INFO.read_text().splitlines() if "model name" in line]
    memory = round(psutil.virtual_memory().total / 1024**3)
    parts = [
        platform.machine(),
        *models[:1],
        f"{os.cpu_count()} cores",
        f"{memory} GiB",
        *_accelerators(),
        f"{threads or len(os.sched_getaffinity(0))} threads",
    ]
    return ", ".join(parts)


def _accelerators() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
