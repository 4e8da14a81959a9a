"""Training a branch: a copy of the seed continues on one domain (Branch-Train-MiX, arXiv 2403.07816).

A share of general text, drawn in between, keeps it from forgetting what the seed knew (replay: arXiv 2403.08763).
"""

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from moestro.artifacts import Artifact, Job
from moestro.config import BranchConfig
from moestro.data.packed import Mixture, PackedTokens
from moestro.errors import InputError
from moestro.models.checkpoint import is_moe, load_model, save_model, stored_dtype
from moestro.training.loop import train

_FEED_FORWARD_WEIGHT = re.compile(r".*layers\.\d+\.mlp\..+")


def train_branch(
    config: BranchConfig, *, seed: Artifact, tokens: Artifact | None, general: Mapping[str, Artifact], job: Job
) -> dict[str, Any]:
    """Train the copy in float32 and write its checkpoint into `job.out`, in the type the seed is stored in.

    With `trainable: ffn` only feed-forward networks change: what `mix` would average stays bit for bit the seed's.
    Where training stops early, the held-out text of the branch's own domain decides.
    Result: the training's figures. Raises `InputError` for a seed that is not dense, and if tokens do not suit
    `general_share`.
    """
    if is_moe(seed.path):
        raise InputError(f"{seed.path} is a Mixture-of-Experts.", hint="Branches start from a dense seed.")
    training = config.training
    mixture = branch_mixture(config, tokens, general)
    model = load_model(seed.path, tokenizer=True)
    trainable = is_feed_forward_weight if config.trainable == "ffn" else lambda _: True
    held_out = (
        {config.domain: PackedTokens.open(tokens.path, "held_out")} if tokens and training.early_stopping else None
    )
    result = train(model, mixture, training, job=job, trainable=trainable, held_out=held_out)
    save_model(model.to(stored_dtype(seed.path)), job.out, tokenizer_from=seed.path)
    return result.figures()


def is_feed_forward_weight(name: str) -> bool:
    """Whether a dense model's parameter of that name belongs to a feed-forward network."""
    return _FEED_FORWARD_WEIGHT.fullmatch(name) is not None


def branch_mixture(config: BranchConfig, tokens: Artifact | None, general: Mapping[str, Artifact]) -> Mixture:
    """What a branch trains on: the domain's text, and between it `general_share` of general text, all of its domains
    alike. Raises `InputError` if tokens do not suit `general_share` or do not fill a sequence."""
    _check(config, tokens, general)
    own, share = config.domain, Fraction(str(config.general_share))
    artifacts = {own: tokens, **general}
    shares = {own: 1 - share, **dict.fromkeys(general, share / max(1, len(general)))}
    domains = {name: PackedTokens.open(found.path, "train") for name, found in artifacts.items() if found}
    return Mixture(domains, config.training.sequence_length, config.training.seed, shares)


def _check(config: BranchConfig, tokens: Artifact | None, general: Mapping[str, Artifact]) -> None:
    own, share = config.domain, config.general_share
    if tokens is None:
        raise InputError(f"There are no tokens of {own} to train its branch on.", hint="Hand them in as `tokens`.")
    if own in general:
        raise InputError(f"The tokens of {own} are handed in as general text of its own branch.")
    if share and not general:
        raise InputError(
            f"general_share is {share}, and there is no general text.", hint="Hand in tokens as `general/DOMAIN`."
        )
    if general and not share:
        raise InputError(
            f"Tokens of {', '.join(general)} are handed in as general text, but general_share is 0.",
            hint="Set general_share, or leave them out.",
        )
