"""The `branch` stage: a copy of the seed continues training on one domain (Branch-Train-MiX, arXiv 2403.07816)."""

import re
from typing import Any

from moestro.artifacts import Artifact, Job
from moestro.config import BranchConfig
from moestro.data.packed import Mixture, PackedTokens
from moestro.errors import InputError
from moestro.models.checkpoint import is_moe, load_model, save_model, stored_dtype
from moestro.training.loop import train

_FEED_FORWARD_WEIGHT = re.compile(r".*layers\.\d+\.mlp\..+")


def branch(config: BranchConfig, *, seed: Artifact, tokens: Artifact, job: Job) -> dict[str, Any]:
    """Train the copy in float32 and write its checkpoint into `job.out`, in the type the seed is stored in.

    With `trainable: ffn` only feed-forward networks change: what `mix` would average stays bit for bit the seed's.
    Result: the training's figures. Raises `InputError` for a seed that is not dense.
    """
    if is_moe(seed.path):
        raise InputError(f"{seed.path} is a Mixture-of-Experts.", hint="Branches start from a dense seed.")
    training = config.training
    domain = PackedTokens.open(tokens.path, "train")
    mixture = Mixture({config.domain: domain}, training.sequence_length, training.seed)
    model = load_model(seed.path, tokenizer=True)
    trainable = is_feed_forward_weight if config.trainable == "ffn" else lambda _: True
    result = train(model, mixture, training, job=job, trainable=trainable)
    save_model(model.to(stored_dtype(seed.path)), job.out, tokenizer_from=seed.path)
    return result.figures()


def is_feed_forward_weight(name: str) -> bool:
    """Whether a dense model's parameter of that name belongs to a feed-forward network."""
    return _FEED_FORWARD_WEIGHT.fullmatch(name) is not None
