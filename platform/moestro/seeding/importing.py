"""Importing a dense checkpoint as the seed: a Hugging Face directory, or a GGUF file that is dequantised."""

import struct
import tempfile
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from moestro.artifacts import Job
from moestro.config import ImportSeed
from moestro.data.tokenizer import load_tokenizer
from moestro.errors import InputError
from moestro.models.checkpoint import load_config, load_model, refuse_incomplete, save_model
from moestro.models.families import FAMILIES, family_of
from moestro.models.files import check_folder
from moestro.models.routers import parameter_counts
from moestro.seeding.sources import locate

READER_ONLY = ("quantization_config", "_model_name_or_path", "_name_or_path")
"""What transformers notes in a GGUF model's config about the file it came from."""


def import_seed(config: ImportSeed, *, job: Job) -> dict[str, Any]:
    """Write the dense checkpoint that `config.path` names into `job.out`, its weights in `config.dtype`.

    Result: source ("directory" or "gguf"), architecture, parameters, active_parameters, layers, vocab_size, dtype,
    size_bytes. Raises `InputError` for a missing path or package, a truncated or incomplete checkpoint, a missing
    tokenizer, one that does not fit the model, and an architecture that cannot become a Mixture-of-Experts.
    """
    source = locate(config.path)
    dtype: torch.dtype = getattr(torch, config.dtype)
    job.reporter.progress(0, 2, f"reading {source.name}")
    if source.is_dir():
        _check_family(load_config(source, check_folder(source, tokenizer=True)))
        model = load_model(source, dtype=dtype)
        job.reporter.progress(1, 2, "writing")
        save_model(model, job.out, tokenizer_from=source)
    else:
        model = read_gguf(source, dtype=dtype)
        job.reporter.progress(1, 2, "writing")
        with tempfile.TemporaryDirectory(dir=job.scratch) as folder:
            _read_gguf_tokenizer(source).save_pretrained(folder)
            save_model(model, job.out, tokenizer_from=Path(folder))
    _check_tokenizer_fits(job.out, model)
    job.reporter.progress(2, 2, "imported")
    return {
        "source": "directory" if source.is_dir() else "gguf",
        "architecture": model.config.model_type,
        **parameter_counts(model),
        "layers": model.config.num_hidden_layers,
        "vocab_size": model.config.vocab_size,
        "dtype": config.dtype,
        "size_bytes": sum(path.stat().st_size for path in job.out.glob("*.safetensors")),
    }


def read_gguf(path: Path, *, dtype: torch.dtype) -> PreTrainedModel:
    """The dense model in a GGUF file, dequantised, in eval mode.

    A model that transformers reads from GGUF counts as quantised and cannot be saved, so its weights are moved into
    a fresh one. Raises `InputError` if the file is damaged or its architecture cannot become a Mixture-of-Experts.
    """
    _check_gguf(path)
    transformers_logging.disable_progress_bar()
    read, found = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=dtype, local_files_only=True, output_loading_info=True
    )
    refuse_incomplete(path, found)
    _check_family(read.config)
    fields = {name: value for name, value in read.config.to_dict().items() if name not in READER_ONLY}
    model = AutoModelForCausalLM.from_config(type(read.config).from_dict(fields), dtype=dtype)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    return model.eval()


def _check_gguf(path: Path) -> None:
    """Raise `InputError` unless the file can be read to its end and holds a supported architecture."""
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError, UnicodeDecodeError, struct.error) as error:
        raise InputError(
            f"{path} is truncated or no GGUF file ({error}).", hint="Copy it again from its source."
        ) from error
    field = reader.get_field("general.architecture")
    architecture = field.contents() if field else None
    if architecture not in FAMILIES:
        raise InputError(
            f"{path} holds a {architecture!r} model.", hint=f"Supported dense architectures: {', '.join(FAMILIES)}."
        )
    if reader.get_field("tokenizer.ggml.tokens") is None:
        raise InputError(f"{path} holds no tokenizer.", hint="Import a Hugging Face directory that has one.")


def _read_gguf_tokenizer(path: Path) -> Any:
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)


def _check_family(config: Any) -> None:
    """Raise `InputError` now rather than after the branches are trained, if the model cannot be mixed."""
    family_of(config).moe_config(config, num_experts=1, num_experts_per_tok=1)


def _check_tokenizer_fits(folder: Path, model: PreTrainedModel) -> None:
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) > model.config.vocab_size:
        raise InputError(
            f"The tokenizer has {len(tokenizer)} ids, the model embeds {model.config.vocab_size}.",
            hint="It belongs to another model.",
        )
