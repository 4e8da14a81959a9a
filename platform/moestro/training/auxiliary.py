"""What joins the cross entropy in training: losses beside it, and rules that act after a step.

Shapes: B sequences of a micro-batch, N sequences of a step, S positions, S' = S + 1 (inputs are [:, :-1], labels
[:, 1:]), D hidden.
"""

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from moestro.config import Config


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch whose forward pass has just run."""

    tokens_BS: Tensor
    """Token ids [B, S']."""
    domains_B: Tensor
    """Each sequence's domain, as a position in the mixture's domains [B]."""
    hidden_BSD: Tensor
    """What the output head reads [B, S, D], attached to the graph."""
    step_domains_N: Tensor
    """The domains of all sequences that this worker has in the step, its other micro-batches included [N]."""


class Auxiliary(Protocol):
    """The loop calls `begin`, per micro-batch `loss`, after the optimiser's step `end` and then `metrics`."""

    def identity(self) -> Sequence[Config]:
        """What decides what it does: a training checkpoint of another is not taken up."""

    def attached(self) -> AbstractContextManager[None]:
        """What has to be in place on the model while it trains."""

    def begin(self, step: int, total: int) -> None:
        """Optimiser step `step` (from 0) of `total` begins."""

    def loss(self, micro: MicroBatch) -> Tensor:
        """The loss (scalar) of this worker's part of the micro-batch; a step's is the mean over both."""

    def terms(self) -> Sequence[str]:
        """Names of the losses that `loss` adds up."""

    def only(self, terms: Collection[str]) -> AbstractContextManager[None]:
        """Meanwhile `loss` leaves out all others."""

    def end(self) -> None:
        """The optimiser has stepped."""

    def metrics(self) -> dict[str, float]:
        """Figures of the step that has just ended."""

    def state(self) -> dict[str, Any]:
        """What a resumed run needs besides the model (JSON values and tensors)."""

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` returned."""
