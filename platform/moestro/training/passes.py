"""Going through batches, forward and backward."""

import copy
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from moestro.config import TrainingConfig
from moestro.data.packed import Batch, Mixture
from moestro.training import parallel
from moestro.training.auxiliary import Auxiliary
from moestro.training.objective import backward


@dataclass(frozen=True)
class Passes:
    """Forward and backward passes of one run's model through its data."""

    model: PreTrainedModel
    mixture: Mixture
    config: TrainingConfig
    auxiliary: Auxiliary | None

    @property
    def dtype(self) -> torch.dtype:
        """Of the computation."""
        dtype: torch.dtype = getattr(torch, self.config.dtype)
        return dtype

    def batch(self, step: int) -> Batch:
        """The batch of `step` (from 0), that of all workers."""
        return self.mixture.batch(step, self.config.batch_size)

    def gradients(self, batch: Batch) -> float:
        """Add this worker's gradients of the mean loss to `.grad`; returns the mean loss over all workers."""
        config = self.config
        loss = backward(
            self.model,
            parallel.share(batch, config.accumulation),
            accumulation=config.accumulation,
            dtype=self.dtype,
            auxiliary=self.auxiliary,
            cross_document_attention=config.cross_document_attention,
        )
        return parallel.mean(loss)

    def rehearse(self, step: int, total: int) -> float:
        """The loss of the batch of `step` (from 0) as it is trained on in a run of `total` steps.

        The auxiliary is left as it was; gradients stay.
        """
        auxiliary = self.auxiliary
        before = copy.deepcopy(auxiliary.state()) if auxiliary else {}
        if auxiliary:
            auxiliary.begin(step, total)
        loss = self.gradients(self.batch(step))
        if auxiliary:
            auxiliary.restore(before)
        return loss
