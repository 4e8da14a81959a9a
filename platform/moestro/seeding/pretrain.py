"""Pre-training a small Llama-architecture seed on an equal mix of domains, with a tokenizer of their own text.

Tokenizer and token ids are kept in `job.scratch`/text, so that an interrupted run does not make them again.
"""

import math
import shutil
from collections.abc import Iterator, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from moestro.artifacts import Artifact, Job
from moestro.config import ModelConfig, PretrainSeed
from moestro.data.packed import Mixture, PackedTokens
from moestro.data.tokenizer import encode, load_tokenizer, train_bpe
from moestro.errors import ConfigError, InputError
from moestro.models.checkpoint import save_model
from moestro.models.routers import parameter_counts
from moestro.training.loop import train
from moestro.training.parallel import first_worker_first
from moestro.training.state import publish

SAMPLE_CHARACTERS = 2_000_000
"""Characters of each domain that the tokenizer is trained on."""
MAX_REPEATS = 8
"""How often a small domain's text is repeated in that sample, so that each domain counts."""
CHUNK = 512
SPLITS = ("train", "held_out")


def pretrain_seed(config: PretrainSeed, *, corpora: Mapping[str, Artifact], job: Job) -> dict[str, Any]:
    """Train tokenizer and model on the training text of `corpora` and write the checkpoint into `job.out`.

    Result: parameters, vocabulary, tokens of text per domain, and the training's figures. Raises `ConfigError` for a
    vocabulary that the text does not fill, `InputError` for corpora other than those of `config.domains`.
    """
    if config.domains is not None and set(config.domains) != set(corpora):
        raise InputError(
            f"seed.domains are {', '.join(config.domains)}, the corpora handed in are {', '.join(corpora) or 'none'}.",
            hint="Hand in the corpora that seed.domains names, or leave it out.",
        )
    text = job.scratch / "text"
    with first_worker_first():
        if not text.exists():
            _prepare(config, corpora, text, job)
    domains = {name: PackedTokens.open(text / name, "train") for name in corpora}
    stops = config.training.early_stopping is not None
    held_out = {name: PackedTokens.open(text / name, "held_out") for name in corpora} if stops else None
    mixture = Mixture(domains, config.training.sequence_length, config.training.seed)
    model = build_model(config.model, seed=config.training.seed)
    result = train(model, mixture, config.training, job=job, trainable=lambda _: True, held_out=held_out)
    save_model(model, job.out, tokenizer_from=text / "tokenizer")
    return {
        **parameter_counts(model),
        "vocabulary": config.model.vocab_size,
        "text_tokens": {name: len(packed.ids) for name, packed in domains.items()},
        **result.figures(),
    }


def build_model(config: ModelConfig, *, seed: int) -> PreTrainedModel:
    """A Llama with SmallInit (N(0, 2 / 5D), Nguyen and Salazar 2019); projections into the residual stream are divided
    by sqrt(2 L), as in GPT-2. D hidden, L layers. The process's random state is left as it was.
    """
    llama = LlamaConfig(
        **config.model_dump(),
        initializer_range=math.sqrt(2 / (5 * config.hidden_size)),
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(llama)
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                projection.weight.div_(math.sqrt(2 * config.num_hidden_layers))
    return model


def _prepare(config: PretrainSeed, corpora: Mapping[str, Artifact], target: Path, job: Job) -> None:
    """Make `target` in one atomic step: tokenizer/, and a folder of token ids for each domain."""
    temporary = target.with_suffix(".tmp")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    job.reporter.progress(0, len(corpora) + 1, "training the tokenizer")
    vocab_size = config.model.vocab_size
    trained = train_bpe(_sample(corpora), vocab_size)
    if len(trained) != vocab_size:
        raise ConfigError(
            f"seed.model.vocab_size: the text of {', '.join(corpora)} fills only {len(trained)} "
            f"of {vocab_size} entries.",
            hint=f"Set vocab_size to {len(trained)} or less, or add text.",
        )
    trained.save_pretrained(temporary / "tokenizer")
    tokenizer = load_tokenizer(temporary / "tokenizer")
    for position, (name, corpus) in enumerate(corpora.items(), 1):
        job.reporter.progress(position, len(corpora) + 1, f"tokenising {name}")
        for split in SPLITS if config.training.early_stopping else SPLITS[:1]:
            _write_tokens(temporary / name, split, tokenizer, _texts(corpus, split))
    publish(temporary, target)


def _write_tokens(folder: Path, split: str, tokenizer: Any, texts: list[str]) -> None:
    """All documents back to back, each ended by end-of-text, and where each begins: as the tokens stage writes them."""
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    pieces = [
        np.asarray([*ids, tokenizer.eos_token_id], dtype=dtype)
        for start in range(0, len(texts), CHUNK)
        for ids in encode(tokenizer, texts[start : start + CHUNK])
    ]
    folder.mkdir(exist_ok=True)
    np.save(folder / f"{split}.npy", np.concatenate(pieces))
    np.save(folder / f"{split}_documents.npy", np.cumsum([0, *map(len, pieces[:-1])], dtype=np.int64))


def _sample(corpora: Mapping[str, Artifact]) -> Iterator[str]:
    """About the same amount of each domain's text; a small domain is repeated, but not without end."""
    for corpus in corpora.values():
        texts = _texts(corpus)
        budget = min(SAMPLE_CHARACTERS, MAX_REPEATS * sum(map(len, texts)))
        for text in cycle(texts):
            yield text[:budget]
            budget -= len(text)
            if budget <= 0:
                break


def _texts(corpus: Artifact, split: str = "train") -> list[str]:
    path = corpus.path / f"{split}.parquet"
    if not path.is_file():
        raise InputError(f"{corpus.path} is not a corpus: it has no {path.name}.")
    texts: list[str] = pq.read_table(path, columns=["text"]).column("text").to_pylist()
    if not any(texts):
        raise InputError(f"{path} holds no text.", hint="Give the domain some text.")
    return texts
