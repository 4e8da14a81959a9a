"""One micro-batch forward and backward, and one batch made of them.

Where documents of a packed sequence must not see each other, positions restart at each: transformers derives the
block-diagonal mask from them, and `attention` reads the same mask. The last token of a document then has nothing to
predict, and is left out of the mean.

Shapes: B sequences, S' = S + 1 positions (inputs are [:, :-1], labels [:, 1:]), T = B S tokens, M micro-batches,
D hidden, V vocabulary.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moestro.data.packed import Batch
from moestro.errors import InputError
from moestro.training import parallel
from moestro.training.auxiliary import Auxiliary, MicroBatch
from moestro.training.cross_entropy import head_cross_entropy


def next_token_loss(
    model: PreTrainedModel, tokens_BS: Tensor, starts_BS: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean cross entropy of predicting each next token, nats (scalar), and what the head read, [B, S, D].

    `starts_BS` [B, S'], bool: the first tokens of documents that must not see those before them, and are not predicted
    from them. Without it a sequence is one document. Raises `InputError` for a token id beyond the vocabulary.
    """
    head = model.get_output_embeddings()
    if int(tokens_BS.max()) >= len(head.weight):
        raise InputError(
            f"Token id {int(tokens_BS.max())} is beyond the model's vocabulary of {len(head.weight)}.",
            hint="The tokens were made with another seed's tokenizer.",
        )
    positions_BS = None if starts_BS is None else document_positions(starts_BS[:, :-1])
    outputs = model.base_model(input_ids=tokens_BS[:, :-1], position_ids=positions_BS, use_cache=False)
    hidden_BSD = outputs.last_hidden_state
    if (scaling := getattr(model.config, "logits_scaling", 1.0)) != 1.0:
        hidden_BSD = hidden_BSD / scaling  # Granite divides its logits
    hidden_TD, labels_T = hidden_BSD.flatten(0, 1), tokens_BS[:, 1:].flatten()
    if starts_BS is not None:
        (predicted,) = (~starts_BS[:, 1:]).flatten().nonzero(as_tuple=True)
        hidden_TD, labels_T = hidden_TD.index_select(0, predicted), labels_T[predicted]
    return head_cross_entropy(hidden_TD, head.weight, labels_T), hidden_BSD


def document_positions(starts_BS: Tensor) -> Tensor:
    """Each token's position in its document, or in what the sequence has of it; [B, S] from [B, S], bool."""
    places_S = torch.arange(starts_BS.shape[1])
    return places_S - (places_S * starts_BS).cummax(dim=1).values


def backward(
    model: PreTrainedModel,
    batch: Batch,
    *,
    accumulation: int,
    dtype: torch.dtype,
    auxiliary: Auxiliary | None,
    cross_document_attention: bool = True,
) -> float:
    """Add the gradients of the batch's mean loss to `.grad`; returns its mean cross entropy, without `auxiliary`.

    Micro-batches are equal parts of the batch, so the mean of their means is the mean. Where first tokens of documents
    are not predicted, each mean counts by its predicted tokens, those of other workers included.
    """
    total = torch.zeros(())
    weights_M = torch.ones(accumulation) if cross_document_attention else _weights(batch, accumulation)
    parts = (values.chunk(accumulation) for values in batch)
    for weight, tokens_BS, domains_B, starts_BS in zip(weights_M, *parts, strict=True):
        documents_BS = None if cross_document_attention else starts_BS
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            cross_entropy, hidden_BSD = next_token_loss(model, tokens_BS, documents_BS)
        loss = cross_entropy = cross_entropy * weight
        if auxiliary:
            loss = loss + auxiliary.loss(MicroBatch(tokens_BS, domains_B, hidden_BSD, batch.domains_B))
        (loss / accumulation).backward()
        total += cross_entropy.detach()
    return float(total / accumulation)


def _weights(batch: Batch, accumulation: int) -> Tensor:
    """Predicted tokens of each micro-batch by their mean over all micro-batches and workers, [M]."""
    counts_M = torch.stack([(~part_BS[:, 1:]).sum() for part_BS in batch.starts_BS.chunk(accumulation)]).double()
    mean = parallel.total(counts_M).sum() / (accumulation * parallel.num_workers())
    return (counts_M / mean.clamp_min(1)).float()
