"""Going through batches, forward and backward."""

import copy
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from moestro.config import TrainingConfig
from moestro.data.packed import Batch, Mixture, Source
from moestro.errors import InputError
from moestro.training import parallel
from moestro.training.auxiliary import Auxiliary
from moestro.training.divergence import named_windows
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
        """The batch of `step` (from 0), that of all workers.

        Raises `InputError` naming its domains if none of its tokens is predicted.
        """
        batch = self.mixture.batch(step, self.config.batch_size)
        if not self.config.cross_document_attention and bool(batch.starts_BS[:, 1:].all()):
            raise InputError(
                f"Of the batch of step {step + 1} no token is predicted: every document in it is one token long. "
                f"It is {named_windows(self.sources(step))}.",
                hint="Take such documents out, or set cross_document_attention.",
            )
        return batch

    def sources(self, step: int) -> list[Source]:
        """Where the sequences of the batch of `step` come from."""
        return self.mixture.sources(step, self.config.batch_size)

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

        The auxiliary is left as it was; gradients stay. Call it where nothing is to be trained, `nothing_trained`.
        """
        auxiliary = self.auxiliary
        before = copy.deepcopy(auxiliary.state()) if auxiliary else {}
        if auxiliary:
            auxiliary.begin(step, total)
        loss = self.gradients(self.batch(step))
        if auxiliary:
            auxiliary.restore(before)
        return loss
