"""Branch-Train-Merge's ensemble (arXiv 2208.03306, section 3.2): what a baseline of separate models pays.

Each domain's model predicts the next token, weighted by the probability of its domain given the text so far,

    p(x_t | x_<t) = sum_j p_j(x_t | x_<t) P(j | x_<t),   P(j | x_<t) = prod_{s<t} p_j(x_s | x_<s) / sum over all j

with equal priors at the beginning of a window; `top_k` keeps the k most probable and renormalises. Models are loaded
one after the other: all that is kept of each is the loss of every token.

M models, N windows of S tokens, P = S - 1 of which are predicted.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moestro.data.packed import PackedTokens
from moestro.evaluation.loss import token_losses
from moestro.models.checkpoint import load_model


def posterior_ensembles(
    models: Mapping[str, Path],
    tokens: Mapping[str, Path],
    *,
    top_k: Sequence[int],
    sequence_length: int,
    max_tokens: int,
) -> dict[int, dict[str, float]]:
    """Held-out loss by number of models that predict together and by domain, nats per token.

    `models` are checkpoints, `tokens` artifacts, both by name. Windows are read on their own, their first token is not
    predicted. Raises `InputError` for a damaged checkpoint, and for a domain without a whole window.
    """
    windows = {
        name: PackedTokens.open(folder, "held_out").windows(sequence_length)[: max(1, max_tokens // sequence_length)]
        for name, folder in tokens.items()
    }
    found: dict[str, list[Tensor]] = {name: [] for name in windows}
    for folder in models.values():
        model = load_model(folder)
        for name, windows_NS in windows.items():
            found[name].append(token_losses(model, windows_NS).double())
    return {
        count: {name: float(posterior_losses(torch.stack(losses), count).mean()) for name, losses in found.items()}
        for count in top_k
    }


def posterior_losses(losses_MNP: Tensor, top_k: int) -> Tensor:
    """The ensemble's loss of every token [N, P], from each model's own; of equally probable ones the first is kept."""
    before_MNP = torch.cumsum(losses_MNP, dim=-1) - losses_MNP
    log_posterior_MNP = torch.log_softmax(-before_MNP, dim=0)
    order_MNP = log_posterior_MNP.argsort(dim=0, descending=True, stable=True)
    dropped_MNP = torch.ones_like(order_MNP, dtype=torch.bool).scatter(0, order_MNP[:top_k], value=False)
    weights_MNP = log_posterior_MNP.masked_fill(dropped_MNP, -torch.inf).log_softmax(dim=0)
    return -torch.logsumexp(weights_MNP - losses_MNP, dim=0)
