"""Bringing in a branch that was trained from the seed elsewhere, once it is known that it can be mixed."""

import tempfile
from pathlib import Path
from typing import Any

from moestro.artifacts import Artifact, Job
from moestro.config import ImportBranch
from moestro.errors import InputError
from moestro.models.checkpoint import is_moe, load_model, save_model, stored_dtype
from moestro.models.compare import check_same_kind
from moestro.models.gguf_file import read_gguf, read_tokenizer
from moestro.models.routers import parameter_counts
from moestro.models.sources import locate


def import_branch(config: ImportBranch, *, seed: Artifact, job: Job) -> dict[str, Any]:
    """Write the dense checkpoint that `config.path` names into `job.out`, in the type the seed is stored in.

    Result: source ("directory" or "gguf"), parameters, active_parameters, vocab_size, dtype, size_bytes. Raises one
    `InputError` that lists everything in which the checkpoint does not fit the seed: architecture, sizes, settings,
    weights, tokenizer. Feed-forward networks may be of another width, and weights of another type.
    """
    if is_moe(seed.path):
        raise InputError(f"{seed.path} is a Mixture-of-Experts.", hint="Branches belong to a dense seed.")
    source = locate(config)
    job.reporter.progress(0, 2, f"reading {source.name}")
    dtype = stored_dtype(seed.path)
    with tempfile.TemporaryDirectory(dir=job.scratch) as folder:
        directory = source if source.is_dir() else _unpacked(source, Path(folder))
        check_same_kind(seed.path, {config.domain: directory}, unify_vocabulary=config.unify_vocabulary, any_dtype=True)
        model = load_model(directory, dtype=dtype, tokenizer=True)
        job.reporter.progress(1, 2, "writing")
        save_model(model, job.out, tokenizer_from=directory)
    job.reporter.progress(2, 2, "imported")
    return {
        "source": "directory" if source.is_dir() else "gguf",
        **parameter_counts(model),
        "vocab_size": model.config.vocab_size,
        "dtype": str(dtype).removeprefix("torch."),
        "size_bytes": sum(path.stat().st_size for path in job.out.glob("*.safetensors")),
    }


def _unpacked(source: Path, folder: Path) -> Path:
    """The GGUF file as a Hugging Face directory, in the type that holds all it can be quantised to."""
    import torch

    read_tokenizer(source).save_pretrained(folder)
    save_model(read_gguf(source, dtype=torch.float32), folder, tokenizer_from=folder)
    return folder
