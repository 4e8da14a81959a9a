"""First weights of the routers: zero, random, or one direction per domain.

L layers, E experts (one per domain, then the generalist if there is one), D hidden, N windows of S tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moestro.models.routers import feed_forwards
from moestro.models.windows import forward_windows


def random_routers(layers: int, num_experts: int, hidden: int, *, std: float, seed: int) -> Tensor:
    """Router weights [L, E, D], float32, drawn from N(0, std^2) with a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(layers, num_experts, hidden, generator=generator) * std


def centroid_routers(model: PreTrainedModel, windows: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """Router weights [L, E, D], float32, that point to each domain's mean hidden state before the layer's experts.

    `model` is the dense seed: it sees all domains with the same eyes. `windows` are calibration windows [N, S] per
    domain, `names` what each expert was made from; one that is no domain (the generalist) gets a zero row.
    With mu_d the mean of domain d, mu the overall mean and v the variance per feature within domains,

        row_d = c P (mu_d - mu) / v,   P x = x - mu (mu . x) / (mu . mu)

    (the direction of a linear discriminant with a diagonal covariance). P takes out what all tokens share, so that
    no row is favoured by a constant; c makes the standard deviation of the layer's logits 1, features taken as
    independent within a domain.
    """
    moments = {name: _moments(model, windows_NS) for name, windows_NS in windows.items()}
    layers, hidden = len(feed_forwards(model)), model.config.hidden_size
    rows_LED = torch.zeros(layers, len(names), hidden)
    for layer in range(layers):
        directions = _directions({name: per_layer[layer] for name, per_layer in moments.items()})
        for expert, name in enumerate(names):
            if name in directions:
                rows_LED[layer, expert] = directions[name].float()
    return rows_LED


@dataclass
class _Moments:
    """Sums [D] over the tokens that entered one layer's feed-forward network, in float64."""

    count: int = 0
    sums: Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, x_TD: Tensor) -> None:
        self.count += len(x_TD)
        self.sums = self.sums + x_TD.sum(0)
        self.squares = self.squares + x_TD.square().sum(0)


def _moments(model: PreTrainedModel, windows_NS: Tensor) -> list[_Moments]:
    blocks = feed_forwards(model)
    moments = [_Moments() for _ in blocks]
    with _listening(blocks, moments):
        for _ in forward_windows(model, windows_NS):
            pass
    return moments


@contextmanager
def _listening(blocks: Sequence[nn.Module], moments: Sequence[_Moments]) -> Iterator[None]:
    def listen(total: _Moments) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            total.add(args[0].reshape(-1, args[0].shape[-1]).double())

        return hook

    handles = [block.register_forward_pre_hook(listen(total)) for block, total in zip(blocks, moments, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _directions(moments: Mapping[str, _Moments]) -> dict[str, Tensor]:
    """The row [D] of each domain in one layer; domains weigh the same, however many tokens they have."""
    means = {name: total.sums / total.count for name, total in moments.items()}
    mean_D = torch.stack(list(means.values())).mean(0)
    within = [total.squares / total.count - means[name].square() for name, total in moments.items()]
    variance_D = torch.stack(within).mean(0).clamp_min(torch.finfo(torch.float32).eps)
    shared_D = mean_D / mean_D.norm().clamp_min(torch.finfo(torch.float32).tiny)
    rows = {}
    for name, own_D in means.items():
        row_D = (own_D - mean_D) / variance_D
        rows[name] = row_D - shared_D * (shared_D @ row_D)
    rows_ED, centred_ED = torch.stack(list(rows.values())), torch.stack(list(means.values())) - mean_D
    # Variance of the logits: between domains from their means, within them from the features' variances.
    between_E, within_E = (rows_ED @ centred_ED.T).square().mean(1), rows_ED.square() @ variance_D
    spread = (between_E + within_E).mean().sqrt()
    return {name: row_D / spread if spread > 0 else row_D for name, row_D in rows.items()}
