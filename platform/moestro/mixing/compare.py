"""What keeps a branch from being mixed with its seed: every difference at once, in words."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from moestro.artifacts import file_digest
from moestro.errors import InputError
from moestro.models.checkpoint import load_config
from moestro.models.files import TOKENIZERS, check_folder, weight_files

IRRELEVANT = {
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "initializer_range",
    "pretraining_tp",
    "transformers_version",
    "use_cache",
}
"""Config fields that change nothing in what the model computes."""
SHOWN = 5
"""How many differing weights an error lists per branch."""


def check_same_kind(seed: Path, branches: Mapping[str, Path]) -> Any:
    """The seed's transformers config, once every branch is known to have its config, weight shapes and tokenizer.

    Raises one `InputError` that lists all differences of all branches.
    """
    config = load_config(seed, check_folder(seed, tokenizer=True))
    lines = [f"{name}: {line}" for name, folder in branches.items() for line in _differences(seed, config, folder)]
    if lines:
        raise InputError(
            "Branches differ from the seed and cannot be mixed. " + "; ".join(lines) + ".",
            hint="All must be trained from the same seed.",
        )
    return config


def _differences(seed: Path, seed_config: Any, branch: Path) -> list[str]:
    config = load_config(branch, check_folder(branch, tokenizer=True))
    fields = _config_differences(seed_config.to_dict(), config.to_dict())
    weights = _weight_differences(_layout(seed), _layout(branch))
    return fields + weights + _tokenizer_differences(seed, branch)


def _config_differences(seed: dict[str, Any], branch: dict[str, Any]) -> list[str]:
    names = sorted((seed.keys() | branch.keys()) - IRRELEVANT)
    return [
        f"{name} is {branch.get(name)!r}, the seed's is {seed.get(name)!r}"
        for name in names
        if seed.get(name) != branch.get(name)
    ]


def _layout(folder: Path) -> dict[str, str]:
    """Type and shape of every stored weight, by name."""
    layout = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  (a reader, not a mapping)
                view = weights.get_slice(name)
                layout[name] = f"{view.get_dtype()} {list(view.get_shape())}"
    return layout


def _weight_differences(seed: dict[str, str], branch: dict[str, str]) -> list[str]:
    lines = [
        f"{name} is {branch.get(name, 'missing')}, the seed's is {seed.get(name, 'missing')}"
        for name in sorted(seed.keys() | branch.keys())
        if seed.get(name) != branch.get(name)
    ]
    return lines[:SHOWN] + ([f"{len(lines) - SHOWN} more weights"] if len(lines) > SHOWN else [])


def _tokenizer_differences(seed: Path, branch: Path) -> list[str]:
    def digest(folder: Path, name: str) -> str | None:
        path = folder / name
        return file_digest(path) if path.is_file() else None

    return [f"{name} differs from the seed's" for name in TOKENIZERS if digest(seed, name) != digest(branch, name)]
