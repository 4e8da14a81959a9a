"""Loading and saving checkpoints: Hugging Face directories that transformers and vLLM read unchanged.

A model is either loaded completely or refused: transformers fills weights it does not find with random numbers and
only warns, so every key is checked here. Nothing ever reaches for the network.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from moestro.errors import InputError
from moestro.models.files import (
    CONFIG,
    GENERATION_CONFIG,
    TOKENIZER_FILES,
    check_folder,
    check_tokenizer,
    read_config,
    read_json,
)

ORIGINS = "experts.json"
SHOWN = 3
"""How many keys an error lists."""


def load_model(
    folder: Path, *, dtype: torch.dtype = torch.float32, experts: str = "moestro", tokenizer: bool = False
) -> PreTrainedModel:
    """The causal language model in `folder`, in eval mode, its weights cast to `dtype`.

    `experts` names the implementation of the expert MLPs ("moestro", "grouped_mm", "eager"; no matter for dense
    models). `tokenizer` also asks for a tokenizer in the folder.
    Raises `InputError` naming file and cause: missing or unreadable config, unknown architecture, truncated or
    missing safetensors, and any key that is missing, left over or of another shape.
    """
    parsed = check_folder(folder, tokenizer=tokenizer)
    config = load_config(folder, parsed)
    options = {"experts_implementation": _experts_implementation(experts)} if _has_experts(parsed) else {}
    transformers_logging.disable_progress_bar()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # the report of missing keys is raised below
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    except RuntimeError as error:
        if "conversion of the weights" not in str(error):
            raise
        raise InputError(
            f"{folder}: the experts' weights cannot be put together, one is missing or of another shape.",
            hint="Copy the checkpoint again from its source.",
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    refuse_incomplete(folder, found)
    # The folder's generation config travels as a file: transformers would mix its penalties into every `generate`,
    # and refuse to save a model whose config sets a temperature without sampling, as many published ones do.
    model.generation_config = GenerationConfig.from_model_config(config)
    model.eval()
    return model


def _experts_implementation(name: str) -> str:
    """`name`, known to transformers from now on."""
    if name == "moestro":
        from moestro_kernels.experts_mlp import register

        register()
    return name


def load_config(folder: Path, config: dict[str, Any]) -> Any:
    """The transformers config object for the parsed config.json of `folder`; raises `InputError` if it is unusable."""
    kind = config["model_type"]
    if kind not in CONFIG_MAPPING_NAMES or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise InputError(
            f"{folder / CONFIG}: transformers knows no causal language model of model_type {kind!r}.",
            hint="Checkpoints that bring their own code are not supported.",
        )
    if config.get("quantization_config"):
        raise InputError(
            f"{folder / CONFIG} describes quantised weights.",
            hint="Dequantise the checkpoint first: transformers reloads some quantised MoE with random experts.",
        )
    try:
        loaded = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(loaded)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise InputError(f"{folder / CONFIG} is not a valid {kind} config: {error}") from error
    return loaded


def refuse_incomplete(folder: Path, found: dict[str, Any]) -> None:
    """Raise `InputError` if transformers did not fill every weight from the files, or left any in them."""
    hint = "The weights do not belong to this config.json, or the checkpoint is incomplete."
    for kind, verb in (("missing_keys", "lacks"), ("unexpected_keys", "has weights that its config does not know:")):
        keys = sorted(found[kind])
        if keys:
            more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
            raise InputError(f"{folder} {verb} {', '.join(keys[:SHOWN])}{more}.", hint=hint)
    for key, stored, expected in sorted(found["mismatched_keys"]):
        raise InputError(f"{folder}: {key} is {list(stored)}, its config asks for {list(expected)}.", hint=hint)
    if found["error_msgs"]:
        raise InputError(f"{folder} cannot be loaded: {found['error_msgs'][0]}", hint=hint)


def save_model(
    model: PreTrainedModel, out: Path, *, tokenizer_from: Path, origins: list[list[str]] | None = None
) -> None:
    """Write `model` into the folder `out` with the tokenizer, chat template and generation config of `tokenizer_from`.

    `origins` (one list per layer, one name per expert) goes into experts.json and belongs to every MoE checkpoint.
    The same weights give the same bytes. Raises `InputError` if `tokenizer_from` holds no tokenizer.
    """
    check_tokenizer(tokenizer_from)
    out.mkdir(parents=True, exist_ok=True)
    transformers_logging.disable_progress_bar()
    for path in out.glob("*.safetensors"):
        path.unlink()  # a loaded model maps its file: writing over it would change or crash whoever has it open
    generation = tokenizer_from / GENERATION_CONFIG
    kept = generation.read_bytes() if generation.is_file() else None
    model.save_pretrained(out)
    if kept is not None:
        (out / GENERATION_CONFIG).write_bytes(kept)
    _copy_tokenizer(tokenizer_from, out)
    if origins is not None:
        (out / ORIGINS).write_text(json.dumps({"origins": origins}, indent=1) + "\n")


def _copy_tokenizer(source: Path, out: Path) -> None:
    """Copy tokenizer and chat template."""
    if source.resolve() == out.resolve():
        return
    for name in TOKENIZER_FILES:
        path = source / name
        if path.is_dir():
            shutil.copytree(path, out / name, dirs_exist_ok=True)
        elif path.is_file():
            shutil.copyfile(path, out / name)


def is_moe(folder: Path) -> bool:
    """Whether the checkpoint in `folder` is a Mixture-of-Experts; raises `InputError` without a readable config."""
    return _has_experts(read_config(folder))


def _has_experts(config: dict[str, Any]) -> bool:
    return any(config.get(field) for field in ("num_local_experts", "num_experts"))


def stored_dtype(folder: Path) -> torch.dtype:
    """The type the checkpoint in `folder` says its weights have (float32 if it does not say)."""
    config = read_config(folder)
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"{folder / CONFIG}: {name!r} is no type of weights.", hint="Use float32 or bfloat16.")
    return dtype


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
