"""What the seed makes of text before each layer's feed-forward network, as sums: starts that read text need no more.

The seed is one model in memory, and text goes through it batch by batch, so that beside its weights a start keeps two
vectors per layer. D hidden, T tokens, N windows of S tokens, R rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moestro.errors import InputError
from moestro.models.routers import blocks as blocks_of
from moestro.models.windows import forward_windows


@dataclass
class Moments:
    """Sums [D], in float64, over hidden states."""

    count: int = 0
    sums: Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, x_TD: Tensor) -> None:
        """Count the hidden states of T more tokens."""
        x_TD = x_TD.double()
        self.count += len(x_TD)
        self.sums = self.sums + x_TD.sum(0)
        self.squares = self.squares + x_TD.square().sum(0)

    @property
    def mean(self) -> Tensor:
        """Mean."""
        return self.sums / self.count

    @property
    def variance(self) -> Tensor:
        """Variance of each feature."""
        return self.squares / self.count - self.mean.square()


@dataclass(frozen=True)
class TextMoments:
    """Of one text: the moments before each layer's feed-forward network, and of the last layer's output."""

    layers: Sequence[Moments]
    last: Moments


def read_text(model: PreTrainedModel, texts_NS: Sequence[Tensor]) -> TextMoments:
    """What `model`, dense or sparse, makes of all windows [N, S] together; their S may differ.

    Raises `InputError` if that holds NaN or infinity.
    """
    blocks = blocks_of(model)
    found = TextMoments([Moments() for _ in blocks], Moments())
    with _listening(model.base_model, blocks, found):
        for windows_NS in texts_NS:
            for _ in forward_windows(model, windows_NS):
                pass
    if not all(moments.sums.isfinite().all() for moments in (*found.layers, found.last)):
        broken = (name for name, weight in model.named_parameters() if not weight.isfinite().all())
        name = next(broken, "a hidden state")
        raise InputError(
            f"{model.name_or_path}: {name} holds NaN or infinity.",
            hint="Go back to an earlier checkpoint, or copy this one again from its source.",
        )
    return found


@contextmanager
def _listening(base: nn.Module, blocks: Sequence[nn.Module], found: TextMoments) -> Iterator[None]:
    def before(moments: Moments) -> Any:
        return lambda _module, args: moments.add(args[0].flatten(0, 1))

    def last(_module: nn.Module, _args: Any, output: Any) -> None:
        found.last.add(output.last_hidden_state.flatten(0, 1))

    handles = [block.register_forward_pre_hook(before(item)) for block, item in zip(blocks, found.layers, strict=True)]
    handles.append(base.register_forward_hook(last))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def overall_mean(layer: Mapping[str, Moments]) -> Tensor:
    """The mean [D] over domains, which weigh the same however many tokens they have."""
    return torch.stack([moments.mean for moments in layer.values()]).mean(0)


def variance_within(layer: Mapping[str, Moments]) -> Tensor:
    """The variance [D] of each feature within domains."""
    within = torch.stack([moments.variance for moments in layer.values()]).mean(0)
    return within.clamp_min(torch.finfo(torch.float32).eps)


def without_common_part(rows_RD: Tensor, mean_D: Tensor) -> Tensor:
    """`rows_RD` less their parts along `mean_D`: what all tokens share then favours no row."""
    shared_D = mean_D / mean_D.norm().clamp_min(torch.finfo(torch.float32).tiny)
    return rows_RD - (rows_RD @ shared_D)[:, None] * shared_D


def with_unit_spread(rows_RD: Tensor, layer: Mapping[str, Moments]) -> Tensor:
    """`rows_RD` times the factor that gives the layer's logits a standard deviation of 1 over all domains' text.

    Between domains their variance is that of the means, within them that of the features, taken as independent.
    Rows that tell nothing apart stay as they are.
    """
    centred_ND = torch.stack([moments.mean for moments in layer.values()]) - overall_mean(layer)
    between_R, within_R = (rows_RD @ centred_ND.T).square().mean(1), rows_RD.square() @ variance_within(layer)
    spread = (between_R + within_R).mean().sqrt()
    return rows_RD / spread if spread > 0 else rows_RD
