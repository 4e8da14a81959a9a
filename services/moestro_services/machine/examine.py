"""`examine`: everything `moestro doctor` tells, with what is missing and how to mend it."""

import os
import sys
from collections.abc import Iterator

from moestro.config import Config
from moestro_flows.home import Home
from moestro_services.machine import folder as home_folder
from moestro_services.machine import hardware, software

MIN_PYTHON, END_PYTHON = (3, 11), (3, 12)
MIN_MEMORY = 6e9
MIN_FREE = 2e9
APT = "apt-get install -y --no-install-recommends "


class Lack(Config):
    """Something that is missing or wrong."""

    what: str
    """What it is."""
    required: bool
    """Whether Moestro cannot work without it."""
    remedy: str
    """What to install or change."""


class Examination(Config):
    """What this machine can do."""

    ready: bool
    """Whether nothing that is required is missing."""
    python: str
    """Version of this Python."""
    hardware: hardware.Hardware
    """The machine."""
    packages: tuple[software.Package, ...]
    """Packages and whether their versions match."""
    libraries: dict[str, software.Probe]
    """Heavy libraries and whether they can be imported."""
    programs: dict[str, str | None]
    """Programs around."""
    home: home_folder.Folder
    """The home folder."""
    lacks: tuple[Lack, ...]
    """What is missing."""


def examine(home: Home) -> Examination:
    """Look at everything; takes as long as importing torch and vLLM does. Changes nothing."""
    machine, state = hardware.look(), home_folder.look(home)
    packages = software.packages()
    libraries = software.probe(home.environment() | os.environ)
    programs = software.programs()
    lacks = [
        *_of_machine(machine, state),
        *_of_packages(packages, libraries),
        *_of_programs(programs, libraries, machine),
    ]
    return Examination(
        ready=not any(lack.required for lack in lacks),
        python=".".join(str(part) for part in sys.version_info[:3]),
        hardware=machine,
        packages=tuple(packages),
        libraries=libraries,
        programs=programs,
        home=state,
        lacks=tuple(lacks),
    )


def _of_machine(machine: hardware.Hardware, state: home_folder.Folder) -> Iterator[Lack]:
    if not MIN_PYTHON <= sys.version_info[:2] < END_PYTHON:
        yield Lack(what="Python 3.11", required=True, remedy="Make the environment with python3.11: `make env`.")
    if machine.memory_bytes < MIN_MEMORY:
        yield Lack(
            what=f"memory: {machine.memory_bytes / 1e9:.1f} GB",
            required=False,
            remedy=f"The quickstart needs about {MIN_MEMORY / 1e9:.0f} GB.",
        )
    if state.free_bytes < MIN_FREE:
        yield Lack(
            what=f"disk space: {state.free_bytes / 1e9:.1f} GB free",
            required=False,
            remedy="Free some or point MOESTRO_HOME elsewhere.",
        )
    if not state.writable:
        yield Lack(what=f"write access to {state.path}", required=True, remedy="Point MOESTRO_HOME elsewhere.")
    for name in state.unreadable:
        yield Lack(
            what=f"a readable record of {name}", required=True, remedy="Delete its folder; it will be made again."
        )


def _of_packages(packages: list[software.Package], libraries: dict[str, software.Probe]) -> Iterator[Lack]:
    for package in packages:
        if not package.ok:
            found = f"is {package.installed}" if package.installed else "is missing"
            yield Lack(
                what=f"{package.name}{package.wanted} ({found})",
                required=True,
                remedy="Install the lock: `make env`.",
            )
    for name, library in libraries.items():
        if not library.ok:
            yield Lack(what=f"an importable {name} ({library.error})", required=True, remedy="Run `make env` again.")
    torch = libraries["torch"]
    if torch.ok and torch.cuda is None and (extra := software.mismatched()):
        yield Lack(
            what=f"an environment without {', '.join(extra)}",
            required=not libraries["transformers"].ok,
            remedy=f"Their PyPI builds do not match a CPU torch: `pip uninstall {' '.join(extra)}`.",
        )
    if not software.has_plugin():
        yield Lack(what="Moestro among vLLM's plugins", required=True, remedy="Run `make env` again.")


def _of_programs(
    programs: dict[str, str | None], libraries: dict[str, software.Probe], machine: hardware.Hardware
) -> Iterator[Lack]:
    if programs["postgresql"] is None:
        yield Lack(
            what="PostgreSQL (SQLite is used without an address in MOESTRO_DATABASE_URL)",
            required=False,
            remedy=APT + "postgresql",
        )
    if programs["chromium"] is None:
        yield Lack(what="Chromium (renders reports in tests)", required=False, remedy=APT + "chromium")
    if not libraries["torch"].gpus:
        yield Lack(what="a GPU", required=False, remedy="Everything runs on the CPU, more slowly.")
    if not any(machine.instruction_sets[name] for name in ("avx2", "avx512")):
        yield Lack(what="AVX2 or AVX-512", required=False, remedy="vLLM's CPU build needs one of them.")
