"""Environments of the tools that benchmarks compare with, each in a folder of its own in the home's `peers`."""

import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

from moestro.artifacts import exclusive
from moestro.errors import ResourceError
from moestro_flows.home import Home


def peer_environment(name: str, version: str) -> Path:
    """The interpreter of an environment with that package, and with this one's torch and transformers; made once.

    Raises `ResourceError` if pip cannot install them.
    """
    peers = Home.current().path / "peers"
    peers.mkdir(parents=True, exist_ok=True)
    folder = peers / f"{name}-{version}"
    ours = {package: importlib.metadata.version(package).partition("+")[0] for package in ("torch", "transformers")}
    first, *others = [*(f"{package}=={one}" for package, one in ours.items()), f"{name}=={version}"]
    stamp, python = folder / "installed.txt", folder / "bin" / "python"
    with exclusive(folder.with_suffix(".lock"), what=str(folder), wait=True):
        wanted = "\n".join((first, *others))
        if stamp.is_file() and stamp.read_text() == wanted:
            return python
        shutil.rmtree(folder, ignore_errors=True)
        _call(name, sys.executable, "-m", "venv", str(folder))
        for packages in ([first], others):  # which build of torch is pip's own affair
            _call(name, str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages)
        stamp.write_text(wanted)
    return python


def _call(name: str, *command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ResourceError(
            f"`{' '.join(command)}` ended with code {done.returncode}:\n{done.stderr.strip()}",
            hint=f"The benchmark installs {name} from the package index that pip is configured for.",
        )
