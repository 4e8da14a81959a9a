"""One micro-batch forward and backward, and one batch made of them.

Shapes: B sequences, S' = S + 1 positions (inputs are [:, :-1], labels [:, 1:]), T = B S tokens, D hidden, V vocabulary.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moestro.data.packed import Batch
from moestro.errors import InputError
from moestro.training.auxiliary import Auxiliary, MicroBatch
from moestro.training.cross_entropy import head_cross_entropy


def next_token_loss(model: PreTrainedModel, tokens_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross entropy of predicting each next token, nats (scalar), and what the head read, [B, S, D].

    Raises `InputError` for a token id beyond the vocabulary.
    """
    head = model.get_output_embeddings()
    if int(tokens_BS.max()) >= len(head.weight):
        raise InputError(
            f"Token id {int(tokens_BS.max())} is beyond the model's vocabulary of {len(head.weight)}.",
            hint="The tokens were made with another seed's tokenizer.",
        )
    hidden_BSD = model.base_model(input_ids=tokens_BS[:, :-1], use_cache=False).last_hidden_state
    if (scaling := getattr(model.config, "logits_scaling", 1.0)) != 1.0:
        hidden_BSD = hidden_BSD / scaling  # Granite divides its logits
    return head_cross_entropy(hidden_BSD.flatten(0, 1), head.weight, tokens_BS[:, 1:].flatten()), hidden_BSD


def backward(
    model: PreTrainedModel,
    batch: Batch,
    *,
    accumulation: int,
    dtype: torch.dtype,
    auxiliary: Auxiliary | None,
) -> float:
    """Add the gradients of the batch's mean loss to `.grad`; returns its mean cross entropy, without `auxiliary`.

    Micro-batches are equal parts of the batch, so the mean of their means is the mean.
    """
    total = torch.zeros(())
    for tokens_BS, domains_B in zip(
        batch.tokens_BS.chunk(accumulation), batch.domains_B.chunk(accumulation), strict=True
    ):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            cross_entropy, hidden_BSD = next_token_loss(model, tokens_BS)
        loss = cross_entropy
        if auxiliary:
            loss = loss + auxiliary.loss(MicroBatch(tokens_BS, domains_B, hidden_BSD))
        (loss / accumulation).backward()
        total += cross_entropy.detach()
    return float(total / accumulation)
