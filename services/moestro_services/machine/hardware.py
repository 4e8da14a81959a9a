"""Cores, memory, instruction sets, GPU."""

import os
import platform
from pathlib import Path

import psutil

from moestro.config import Config

INSTRUCTION_SETS = {
    "avx2": ("avx2",),
    "avx512": ("avx512f",),
    "avx512_bf16": ("avx512_bf16",),
    "amx": ("amx_tile", "amx_bf16"),
}
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


class Hardware(Config):
    """The machine."""

    system: str
    """Operating system and architecture."""
    cpu: str
    """The processor's name."""
    cores: int
    """Cores this process may use."""
    memory_bytes: int
    """Memory this process may use at most."""
    memory_available_bytes: int
    """Memory that is free or can be freed."""
    instruction_sets: dict[str, bool]
    """What vLLM's and torch's kernels look for."""


def look() -> Hardware:
    """The machine this process runs on."""
    fields = _cpu_fields()
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    memory = psutil.virtual_memory()
    limit = _memory_limit(memory.total)
    return Hardware(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=fields.get("model name", platform.machine()),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=limit,
        memory_available_bytes=min(memory.available, limit),
        instruction_sets={name: flags.issuperset(wanted) for name, wanted in INSTRUCTION_SETS.items()},
    )


def _cpu_fields() -> dict[str, str]:
    """The first processor's lines in /proc/cpuinfo; empty where there is no such file."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    pairs = (line.partition(":") for line in path.read_text().split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _memory_limit(total: int) -> int:
    """The smaller of the machine's memory and this container's limit."""
    if not CGROUP_LIMIT.exists():
        return total
    text = CGROUP_LIMIT.read_text().strip()
    return min(total, int(text)) if text.isdecimal() else total
