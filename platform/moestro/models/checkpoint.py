"""Loading and saving checkpoints: Hugging Face directories that transformers and vLLM read unchanged.

A model is either loaded completely or refused: transformers fills weights it does not find with random numbers and
only warns, so every key is checked here. Nothing ever reaches for the network.
"""

import json
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
    ORIGINS,
    TOKENIZER_FILES,
    check_folder,
    check_tokenizer,
    read_config,
)
from moestro.models.layouts import routed_experts
from moestro.models.weights import StoredWeights
from moestro_kernels.vector_math import settle_vector_math

SHOWN = 3
"""How many keys an error lists."""
QUANTISATION = ("quantization_config", "compression_config")
"""Config fields that describe how weights are quantised."""
UNUSABLE = (
    StrictDataclassError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
)
"""What transformers raises for a config it cannot use."""


def load_model(
    folder: Path, *, dtype: torch.dtype = torch.float32, experts: str = "moestro", tokenizer: bool = False
) -> PreTrainedModel:
    """The causal language model in `folder`, in eval mode, its weights cast to `dtype`.

    `experts` names the implementation of the expert MLPs ("moestro", "grouped_mm", "eager"; no matter for dense
    models). `tokenizer` also asks for a tokenizer in the folder.
    Raises `InputError` naming file and cause: missing or unreadable config, unknown architecture, truncated or
    missing safetensors, and any key that is missing, left over or of another shape; one without elements may be
    missing.
    """
    settle_vector_math()
    parsed = check_folder(folder, tokenizer=tokenizer)
    config = load_config(folder, parsed)
    options = {"experts_implementation": _experts_implementation(experts)} if routed_experts(parsed) else {}
    transformers_logging.disable_progress_bar()
    try:
        with _quietly():
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
    sizes = {name: weight.numel() for name, weight in model.state_dict().items()}
    found["missing_keys"] = {name for name in found["missing_keys"] if sizes.get(name) != 0}
    refuse_incomplete(folder, found)
    # The folder's generation config travels as a file: transformers would mix its penalties into every `generate`,
    # and refuse to save a model whose config sets a temperature without sampling, as many published ones do.
    model.generation_config = GenerationConfig.from_model_config(config)
    model.eval()
    return model


@contextmanager
def _quietly() -> Iterator[None]:
    """No report of missing keys, which are raised, nor of tensors without elements, which mean nothing."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _experts_implementation(name: str) -> str:
    """`name`, known to transformers from now on."""
    if name == "moestro":
        from moestro_kernels.experts_mlp import register

        register()
    return name


def load_config(folder: Path, config: dict[str, Any]) -> Any:
    """The transformers config object for the parsed config.json of `folder`.

    Raises `InputError` if it is unusable, or describes quantised weights.
    """
    if is_quantised(config):
        raise InputError(
            f"{folder / CONFIG} describes quantised weights.",
            hint="Dequantise the checkpoint first: transformers reloads some quantised MoE with random experts.",
        )
    loaded = parse_config(folder, config)
    meta_model(folder, loaded)
    return loaded


def parse_config(folder: Path, config: dict[str, Any]) -> Any:
    """As `load_config`, whether or not a model can be built of it, and its weights are quantised."""
    kind = config["model_type"]
    if kind not in CONFIG_MAPPING_NAMES or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise InputError(
            f"{folder / CONFIG}: transformers knows no causal language model of model_type {kind!r}.",
            hint="Checkpoints that bring their own code are not supported.",
        )
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except UNUSABLE as error:
        raise InputError(f"{folder / CONFIG} is not a valid {kind} config: {error}") from error


def is_quantised(config: Mapping[str, Any]) -> bool:
    """Whether a parsed config.json describes quantised weights, its language model's for one of several parts."""
    parts = (config, config.get("text_config"))
    return any(part.get(field) for part in parts if isinstance(part, dict) for field in QUANTISATION)


def meta_model(folder: Path, config: Any) -> PreTrainedModel:
    """The model transformers builds of `config`, without memory; raises `InputError` naming `folder` if it cannot."""
    try:
        with torch.device("meta"), _quietly():
            return AutoModelForCausalLM.from_config(config)
    except UNUSABLE as error:
        raise InputError(f"{folder / CONFIG} is not a valid {config.model_type} config: {error}") from error


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
    The same weights give the same bytes. Tensors without elements are left out: vLLM refuses those of a shared expert
    of width 0. Raises `InputError` if `tokenizer_from` holds no tokenizer.
    """
    check_tokenizer(tokenizer_from)
    out.mkdir(parents=True, exist_ok=True)
    transformers_logging.disable_progress_bar()
    for path in out.glob("*.safetensors*"):
        path.unlink()  # a loaded model maps its file: writing over it would change or crash whoever has it open
    generation = tokenizer_from / GENERATION_CONFIG
    kept = generation.read_bytes() if generation.is_file() else None
    model.save_pretrained(out, state_dict={name: item for name, item in model.state_dict().items() if item.numel()})
    if kept is not None:
        (out / GENERATION_CONFIG).write_bytes(kept)
    save_files_beside(out, tokenizer_from=tokenizer_from, origins=origins)


def save_config(config: Any, out: Path, *, dtype: torch.dtype) -> None:
    """Write the config.json and generation_config.json that transformers would write for such a model of `dtype`."""
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.dtype = dtype
    config.save_pretrained(out)
    GenerationConfig.from_model_config(config).save_pretrained(out)


def save_files_beside(out: Path, *, tokenizer_from: Path, origins: list[list[str]] | None) -> None:
    """Copy tokenizer, chat template and generation config of `tokenizer_from` to `out`, and write experts.json."""
    if tokenizer_from.resolve() != out.resolve() and (tokenizer_from / GENERATION_CONFIG).is_file():
        shutil.copyfile(tokenizer_from / GENERATION_CONFIG, out / GENERATION_CONFIG)
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
    return routed_experts(read_config(folder)) > 0


def stored_dtype(folder: Path) -> torch.dtype:
    """The type the checkpoint in `folder` says its weights have; if it does not say, the one that most of them have."""
    config = read_config(folder)
    name = config.get("dtype") or config.get("torch_dtype")
    if not name:
        return _most_common_dtype(StoredWeights(folder))
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"{folder / CONFIG}: {name!r} is no type of weights.", hint="Use float32 or bfloat16.")
    return dtype


def _most_common_dtype(weights: StoredWeights) -> torch.dtype:
    """By bytes, among types that are computed in; float32 if there are none."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in weights.values():
        if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1:
            sizes[tensor.dtype] += tensor.length
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)
