"""What a checkpoint folder must hold before anything is loaded from it: config, intact weights, tokenizer.

Everything here reads headers only, so that a truncated or incomplete checkpoint is refused at once, by name.
"""

import filecmp
import json
import struct
from pathlib import Path
from typing import Any

from moestro.errors import InputError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
GENERATION_CONFIG = "generation_config.json"
ORIGINS = "experts.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
TOKENIZER_FILES = (
    *TOKENIZERS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
)
HEADER_LENGTH = struct.Struct("<Q")
LFS_POINTER = b"version https://git-lfs"
"""How the text begins that Git keeps instead of a large file."""


def read_json(path: Path) -> Any:
    """The JSON value in `path`; raises `InputError` if it is missing or cannot be read as JSON."""
    try:
        content = path.read_bytes()
        _refuse_pointer(path, content)
        return json.loads(content)
    except FileNotFoundError:
        raise InputError(f"{path} is missing.", hint="A checkpoint is a Hugging Face directory.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not readable JSON ({error}).", hint="Copy it again from its source.") from None


def _refuse_pointer(path: Path, start: bytes) -> None:
    if start.startswith(LFS_POINTER):
        raise InputError(
            f"{path} is a Git LFS pointer, not the file it stands for.", hint="Fetch the file: git lfs pull."
        )


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of `folder`; raises `InputError` if there is none or it is not a JSON object."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a directory.", hint="A checkpoint is a Hugging Face directory.")
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise InputError(f"{folder / CONFIG} names no model_type.", hint="It must be a transformers config.")
    return config


def read_origins(folder: Path) -> list[list[str]]:
    """What each expert was made from, per layer: names of domains, or "seed".

    Raises `InputError` if `folder` has no experts.json, or one that does not hold a list of names per layer.
    """
    path = folder / ORIGINS
    content = read_json(path)
    origins = content.get("origins") if isinstance(content, dict) else None
    if not isinstance(origins, list) or not all(
        isinstance(layer, list) and all(isinstance(name, str) for name in layer) for layer in origins
    ):
        raise InputError(f"{path} does not hold a list of names per layer.", hint="The mix stage writes it.")
    return origins


def known_origins(folder: Path) -> list[list[str]] | None:
    """`read_origins`, None for a checkpoint without experts.json: one that Moestro has not mixed."""
    return read_origins(folder) if (folder / ORIGINS).is_file() else None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, one or the index's shards; raises `InputError` for a missing one."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise InputError(
            f"{folder} has no {WEIGHTS}.", hint="Only safetensors are read: convert other formats with save_pretrained."
        )
    index = read_json(folder / INDEX)
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
        raise InputError(f"{folder / INDEX} has no weight_map.", hint="Copy it again from its source.")
    shards = [folder / name for name in sorted(set(index["weight_map"].values()))]
    for shard in shards:
        if not shard.is_file():
            raise InputError(f"{shard} is missing, though {INDEX} names it.", hint="Copy it again from its source.")
    return shards


def check_safetensors(path: Path) -> None:
    """Raise `InputError` unless the file holds exactly the bytes its header announces."""
    hint = "It was cut off or damaged: copy it again from its source."
    size = path.stat().st_size
    with path.open("rb") as stream:
        _refuse_pointer(path, stream.read(len(LFS_POINTER)))
        stream.seek(0)
        prefix = stream.read(HEADER_LENGTH.size)
        if len(prefix) < HEADER_LENGTH.size:
            raise InputError(f"{path} is truncated: {size} bytes hold no header.", hint=hint)
        (length,) = HEADER_LENGTH.unpack(prefix)
        if HEADER_LENGTH.size + length > size:
            raise InputError(f"{path} is truncated or no safetensors file: its header does not fit in it.", hint=hint)
        try:
            header = json.loads(stream.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            expected = HEADER_LENGTH.size + length + max(ends, default=0)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise InputError(f"{path} has a header that cannot be read.", hint=hint) from None
    if size != expected:
        raise InputError(f"{path} has {size} bytes where its header announces {expected}.", hint=hint)


def check_tokenizer(folder: Path, *, like: Path | None = None) -> None:
    """Raise `InputError` unless `folder` holds a tokenizer. Files equal to those of `like` are not parsed again."""
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise InputError(
            f"{folder} holds no tokenizer (none of {', '.join(TOKENIZERS)}).",
            hint="Put the model's tokenizer.json and tokenizer_config.json beside its weights.",
        )
    for name in TOKENIZER_FILES:
        if name.endswith(".json") and (folder / name).is_file() and not (like and _same_file(folder, like, name)):
            read_json(folder / name)


def _same_file(one: Path, other: Path, name: str) -> bool:
    return (other / name).is_file() and filecmp.cmp(one / name, other / name, shallow=False)


def check_folder(folder: Path, *, tokenizer: bool, like: Path | None = None) -> dict[str, Any]:
    """The config of a checkpoint whose weight files are all there and whole, and its tokenizer if asked for.

    `like` is a folder that has been checked. Raises `InputError` naming the file and what is wrong with it.
    """
    config = read_config(folder)
    for path in weight_files(folder):
        check_safetensors(path)
    if tokenizer:
        check_tokenizer(folder, like=like)
    return config
