"""Importing a dense checkpoint as the seed: a Hugging Face directory, or a GGUF file that is dequantised."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from moestro.artifacts import Job
from moestro.config import ImportSeed
from moestro.data.tokenizer import load_tokenizer
from moestro.errors import InputError
from moestro.models.checkpoint import load_config, load_model, save_model
from moestro.models.families import check_seed
from moestro.models.files import check_folder
from moestro.models.gguf_file import read_gguf, read_tokenizer
from moestro.models.routers import parameter_counts
from moestro.models.sources import locate


def import_seed(config: ImportSeed, *, job: Job) -> dict[str, Any]:
    """Write the dense checkpoint that `config.path` names into `job.out`, its weights in `config.dtype`.

    Result: source ("directory" or "gguf"), architecture, parameters, active_parameters, layers, vocab_size, dtype,
    size_bytes. Raises `InputError` for a missing path or package, a truncated or incomplete checkpoint, a missing
    tokenizer, one that does not fit the model, and an architecture that cannot become a Mixture-of-Experts.
    """
    source = locate(config)
    dtype: torch.dtype = getattr(torch, config.dtype)
    job.reporter.progress(0, 2, f"reading {source.name}")
    if source.is_dir():
        check_seed(load_config(source, check_folder(source, tokenizer=True)))
        model = load_model(source, dtype=dtype)
        job.reporter.progress(1, 2, "writing")
        save_model(model, job.out, tokenizer_from=source)
    else:
        model = read_gguf(source, dtype=dtype)
        job.reporter.progress(1, 2, "writing")
        with tempfile.TemporaryDirectory(dir=job.scratch) as folder:
            read_tokenizer(source).save_pretrained(folder)
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


def _check_tokenizer_fits(folder: Path, model: PreTrainedModel) -> None:
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) > model.config.vocab_size:
        raise InputError(
            f"The tokenizer has {len(tokenizer)} ids, the model embeds {model.config.vocab_size}.",
            hint="It belongs to another model.",
        )
