"""Loss on held-out text while training, and stopping when it no longer falls.

Shapes: N windows, S' = S + 1 tokens of a window, B windows of a forward pass.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moestro.config import EarlyStopping, TrainingConfig
from moestro.data.packed import PackedTokens
from moestro.errors import InputError, TrainingError
from moestro.training import parallel
from moestro.training.divergence import HINT
from moestro.training.objective import next_token_loss
from moestro.training.state import trained_tensors

TOKENS_PER_FORWARD = 4096
HELD_OUT_LOSS = "held_out_loss"


class HeldOutText:
    """Windows of each domain's held-out text, spread evenly over it, read as in training."""

    def __init__(self, domains: Mapping[str, PackedTokens], config: TrainingConfig, max_tokens: int) -> None:
        """Raises `InputError` for a domain of which no token is predicted."""
        self.config = config
        self.windows = {
            name: _windows(name, packed, config.sequence_length, max_tokens) for name, packed in domains.items()
        }
        for name, (_, starts_NS) in self.windows.items():
            if not config.cross_document_attention and bool(starts_NS[:, 1:].all()):
                raise InputError(
                    f"Of the held-out text of domain {name!r} no token is predicted: every document is one token long.",
                    hint="Give it longer documents, or set cross_document_attention.",
                )

    def losses(self, model: PreTrainedModel, step: int) -> dict[str, float]:
        """`held_out_loss/<domain>`: nats per predicted token; `held_out_loss`: their mean, each domain counting alike.

        Every worker reads its part; all get the same figures. Routers decide for themselves, whatever training does.
        Raises `TrainingError` naming domain and `step` (finished steps) for a loss that is not finite.
        """
        model.eval()
        by_domain = {name: self._mean(model, *windows) for name, windows in self.windows.items()}
        model.train()
        for name, loss in by_domain.items():
            if not isfinite(loss):
                raise TrainingError(
                    f"Training stopped after step {step}: the loss on the held-out text of domain {name!r} is {loss}.",
                    hint=HINT,
                )
        mean = sum(by_domain.values()) / len(by_domain)
        return {HELD_OUT_LOSS: mean} | {f"{HELD_OUT_LOSS}/{name}": loss for name, loss in by_domain.items()}

    @torch.no_grad()
    def _mean(self, model: PreTrainedModel, tokens_NS: Tensor, starts_NS: Tensor) -> float:
        mine = slice(parallel.rank(), None, parallel.num_workers())
        size = max(1, TOKENS_PER_FORWARD // tokens_NS.shape[1])
        sums = torch.zeros(2, dtype=torch.float64)
        for tokens_BS, starts_BS in zip(tokens_NS[mine].split(size), starts_NS[mine].split(size), strict=True):
            if not len(tokens_BS):
                continue
            separate = not self.config.cross_document_attention
            predicted = int((~starts_BS[:, 1:]).sum()) if separate else tokens_BS[:, 1:].numel()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
                loss, _ = next_token_loss(model, tokens_BS, starts_BS if separate else None)
            sums += torch.tensor([float(loss) * predicted, predicted], dtype=torch.float64)
        total, count = parallel.total(sums).tolist()
        return total / max(1, count)


def _windows(name: str, packed: PackedTokens, sequence_length: int, max_tokens: int) -> tuple[Tensor, Tensor]:
    """Token ids and first tokens of documents, [N, S'] each; S' is shorter for text that is."""
    length = min(sequence_length + 1, len(packed.ids))
    if length < 2:
        raise InputError(f"Domain {name!r} has no held-out text to stop early by.", hint="Give it more text.")
    available = len(packed.ids) // length
    count = max(1, min(available, max_tokens // length))
    begins = (np.arange(count) * available // count * length).tolist()
    tokens = np.stack([packed.ids[begin : begin + length] for begin in begins]).astype(np.int64)
    starts = np.stack([packed.starts(begin, length) for begin in begins])
    return torch.from_numpy(tokens), torch.from_numpy(starts)


@dataclass
class Stopper:
    """The course of the held-out loss, and the weights at its lowest."""

    config: EarlyStopping
    best_loss: float = inf
    best_step: int = 0
    reference: float = inf
    """Loss of the last measurement that counted as an improvement."""
    failed: int = 0
    """Measurements since."""
    weights: dict[str, Tensor] = field(default_factory=dict)

    def measured(self, step: int, loss: float, model: nn.Module) -> None:
        """Take the measurement after `step` finished steps; its weights are kept if it is the lowest so far."""
        if loss < self.best_loss:
            self.best_loss, self.best_step = loss, step
            self.weights = {name: value.clone() for name, value in trained_tensors(model).items()}
        if loss < self.reference - self.config.min_improvement:
            self.reference, self.failed = loss, 0
        else:
            self.failed += 1

    @property
    def stopped(self) -> bool:
        """Whether patience has run out."""
        return self.failed >= self.config.patience

    def load_best(self, model: nn.Module) -> None:
        """Give `model` the weights of the lowest measurement."""
        for name, value in trained_tensors(model).items():
            value.copy_(self.weights[name])

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {name: getattr(self, name) for name in _STATE}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` returned."""
        for name in _STATE:
            setattr(self, name, state[name])


_STATE = ("best_loss", "best_step", "reference", "failed", "weights")
