"""Running a model over many windows of text without gradients, for whoever listens through hooks.

N windows of S tokens, V vocabulary.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moestro.errors import InputError

TOKENS_PER_FORWARD = 4096


def spread_windows(ids: np.ndarray, *, length: int, max_tokens: int) -> Tensor:
    """Windows [N, S] of `length` tokens (fewer if the text is shorter), spread evenly over the text.

    N is the most that fits into `max_tokens`, and at least one. Raises `InputError` for a text without tokens.
    """
    if not len(ids):
        raise InputError("A domain has no tokens to measure on.", hint="Give it more text.")
    length = min(length, len(ids), max_tokens)
    available = len(ids) // length
    count = min(available, max_tokens // length)
    chosen = np.arange(count) * available // count
    return torch.from_numpy(ids[: available * length].reshape(available, length)[chosen].astype(np.int64))


def forward_windows(model: PreTrainedModel, windows_NS: Tensor) -> Iterator[Tensor]:
    """Run the model's layers, without its head, over `windows_NS`; yields each batch [B, S] after its forward pass.

    Raises `InputError` if a token id is beyond the model's vocabulary.
    """
    size = model.get_input_embeddings().num_embeddings
    if int(windows_NS.max()) >= size:
        raise InputError(
            f"Token id {int(windows_NS.max())} is beyond the model's vocabulary of {size}.",
            hint="The tokens were made with another seed's tokenizer.",
        )
    for batch_BS in windows_NS.split(max(1, TOKENS_PER_FORWARD // windows_NS.shape[1])):
        with torch.no_grad():
            model.base_model(input_ids=batch_BS.to(model.device), use_cache=False)
        yield batch_BS
