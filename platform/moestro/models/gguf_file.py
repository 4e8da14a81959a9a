"""A dense model in a GGUF file, dequantised, if transformers reads all that the file says of it.

Its reader leaves out what it does not know without a word: scaled rotary embeddings, biases, head widths. A file that
holds such things is refused by name.
"""

import struct
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from moestro.errors import InputError
from moestro.models.checkpoint import refuse_incomplete
from moestro.models.families import FAMILIES, check_seed, families_of

MODEL_TYPES = {
    "command-r": "cohere",
    "gemma3": "gemma3_text",
    "gemma3n": "gemma3n_text",
    "gemma4": "gemma4_text",
    "glm4moe": "glm4_moe",
    "gptneox": "gpt_neox",
    "hunyuan-dense": "hunyuan_v1_dense",
    "phi2": "phi",
    "qwen2moe": "qwen2_moe",
    "qwen35": "qwen3_5_text",
    "qwen3moe": "qwen3_moe",
}
"""GGUF's names of architectures where transformers has another."""
READ = ("llama", "mistral", "qwen2", "qwen3")
"""Architectures that can be mixed and that transformers reads from GGUF."""
READER_ONLY = ("quantization_config", "_model_name_or_path", "_name_or_path")
"""What transformers notes in a GGUF model's config about the file it came from."""
ROTARY_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
DIRECTORY = "Import the Hugging Face directory of the model instead."


def read_gguf(path: Path, *, dtype: torch.dtype) -> PreTrainedModel:
    """The dense model in a GGUF file, dequantised, in eval mode.

    A model that transformers reads from GGUF counts as quantised and cannot be saved, so its weights are moved into
    a fresh one. Raises `InputError` if the file is damaged, its architecture cannot become a Mixture-of-Experts, or it
    holds something that would be lost.
    """
    reader = _open(path)
    _check_architecture(path, reader)
    _check_rotary(path, reader)
    transformers_logging.disable_progress_bar()
    place: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    config = AutoConfig.from_pretrained(path.parent, **place)
    if width := _value(reader, "attention.key_length"):
        config.head_dim = width
    check_seed(config)
    read, found = AutoModelForCausalLM.from_pretrained(
        path.parent, config=config, dtype=dtype, output_loading_info=True, **place
    )
    refuse_incomplete(path, found)
    _check_all_read(path, reader, read)
    fields = {name: value for name, value in read.config.to_dict().items() if name not in READER_ONLY}
    model = AutoModelForCausalLM.from_config(type(read.config).from_dict(fields), dtype=dtype)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    return model.eval()


def read_tokenizer(path: Path) -> Any:
    """The tokenizer in a GGUF file."""
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)


def _open(path: Path) -> GGUFReader:
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, UnicodeDecodeError, struct.error) as error:
        raise InputError(
            f"{path} is truncated or no GGUF file ({error}).", hint="Copy it again from its source."
        ) from error


def _architecture(reader: GGUFReader) -> str:
    field = reader.get_field("general.architecture")
    return str(field.contents()) if field else "nameless"


def _value(reader: GGUFReader, name: str) -> Any:
    """The value of a key below the architecture's name, None if it is not there."""
    field = reader.get_field(f"{_architecture(reader)}.{name}")
    return field.contents() if field else None


def _check_architecture(path: Path, reader: GGUFReader) -> None:
    """Raise `InputError` unless the file holds a tokenizer and a dense model that can be read and mixed."""
    architecture = _architecture(reader)
    families_of(MODEL_TYPES.get(architecture, architecture))
    if architecture not in READ:
        raise InputError(f"{path}: transformers reads no {architecture} models from GGUF.", hint=DIRECTORY)
    if _value(reader, "expert_count"):
        raise InputError(
            f"{path} holds a Mixture-of-Experts already.", hint=f"Supported dense architectures: {', '.join(FAMILIES)}."
        )
    if reader.get_field("tokenizer.ggml.tokens") is None:
        raise InputError(f"{path} holds no tokenizer.", hint="Import a Hugging Face directory that has one.")


def _check_rotary(path: Path, reader: GGUFReader) -> None:
    scaling = _value(reader, "rope.scaling.type")
    if scaling not in (None, "none") or any(tensor.name in ROTARY_TENSORS for tensor in reader.tensors):
        raise InputError(f"{path} scales its rotary embedding, which transformers does not read.", hint=DIRECTORY)


def _check_all_read(path: Path, reader: GGUFReader, model: PreTrainedModel) -> None:
    stored = len({weight.data_ptr() for weight in model.state_dict().values()})
    if stored != len(reader.tensors):
        raise InputError(
            f"{path} holds {len(reader.tensors)} tensors, of which transformers reads {stored}.", hint=DIRECTORY
        )
