"""Single experts that stay as they are, though one parameter holds all experts of a layer.

Their rows of the gradient are emptied before it is clipped, so that its norm is that of what trains, and their rows of
the weights are put back after the step: weight decay and averaging over experts would move them. E experts.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moestro.errors import ConfigError
from moestro.models.routers import experts


class FrozenExperts:
    """The experts of `model` that were made from one of `names`; their weights as they are now are kept."""

    def __init__(self, model: PreTrainedModel, origins: Sequence[Sequence[str]], names: Sequence[str]) -> None:
        """`origins`: what each expert was made from, per layer. Raises `ConfigError` for an origin no expert has."""
        there = Counter(origin for layer in origins for origin in layer)
        for name in names:
            if name not in there:
                raise ConfigError(
                    f"tune.frozen_experts: no expert comes from {name!r}.",
                    hint=f"There are experts from {', '.join(sorted(there))}.",
                )
        self._rows = [[row for row, origin in enumerate(layer) if origin in names] for layer in origins]
        self._kept: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        for module, frozen in zip(experts(model), self._rows, strict=True):
            rows = torch.tensor(frozen, dtype=torch.long)
            for parameter in module.parameters() if len(rows) else ():
                self._kept.append((parameter, rows, parameter.detach()[rows].clone()))

    def identity(self) -> list[list[int]]:
        """Which experts they are, per layer."""
        return self._rows

    def empty_gradients(self) -> None:
        """Call before gradients are clipped."""
        for parameter, rows, _ in self._kept:
            if parameter.grad is not None:
                parameter.grad[rows] = 0

    @torch.no_grad()
    def restore(self) -> None:
        """Call after everything that changes weights in a step."""
        for parameter, rows, weights in self._kept:
            parameter[rows] = weights
