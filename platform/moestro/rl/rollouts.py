"""What the engine answered and what it earned, as one right-padded batch that the trainer can slice.

Position s of a sequence is input token s, whose logits give the log-probability of token s + 1; routing row s of the
engine is the routing of that same input token. Padding stands to the right, where causal attention never looks.

Shapes: N prompts, G completions per prompt, B = N G sequences, S positions, L layers, K chosen experts.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from moestro.inference.engine import Completion


@dataclass(frozen=True)
class Rollouts:
    """A batch of completed sequences."""

    inputs_BS: Tensor
    """Token ids, int64."""
    targets_BS: Tensor
    """The token after each input, int64."""
    mask_BS: Tensor
    """True where the target is a completion token."""
    real_BS: Tensor
    """True where the input is not padding."""
    engine_logprobs_BS: Tensor
    """float32 log-probabilities of the targets in the engine, 0 outside the mask."""
    advantages_B: Tensor
    """float32."""
    routes_BSLK: Tensor | None
    """Expert ids, int64; padding has ids 0 to K-1. None where there are none, the engine's or the trainer's own."""
    old_logprobs_BS: Tensor | None = None
    """float32 log-probabilities of the targets in the trainer before the batch, 0 outside the mask."""
    importance_BS: Tensor | None = None
    """float32 weights of the tokens' surrogates; None: all 1."""
    reference_logprobs_BS: Tensor | None = None
    """float32 log-probabilities of the targets in the model that the stage began with; None without a KL penalty."""

    def __len__(self) -> int:
        """Sequences."""
        return len(self.inputs_BS)

    @property
    def tokens(self) -> int:
        """Completion tokens."""
        return int(self.mask_BS.sum())

    def part(self, start: int, stop: int) -> "Rollouts":
        """Sequences `start` to `stop`, cut to the longest of them."""
        length = int(self.real_BS[start:stop].sum(dim=1).max())
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        cut = {
            name: value[start:stop] if value.dim() == 1 else value[start:stop, :length]
            for name, value in values.items()
            if value is not None
        }
        return replace(self, **cut)

    def micro_batches(self, size: int) -> list["Rollouts"]:
        """Consecutive parts of at most `size` sequences."""
        return [self.part(start, min(start + size, len(self))) for start in range(0, len(self), size)]

    def mini_batches(self, count: int) -> list["Rollouts"]:
        """`count` consecutive parts of nearly the same number of sequences."""
        borders = [len(self) * index // count for index in range(count + 1)]
        return [self.part(start, stop) for start, stop in itertools.pairwise(borders)]


def collate(prompts: Sequence[list[int]], groups: Sequence[Sequence[Completion]], advantages_NG: Tensor) -> Rollouts:
    """One batch of all completions, those of a prompt side by side."""
    pairs = [(prompt, answer) for prompt, group in zip(prompts, groups, strict=True) for answer in group]
    lengths = [len(prompt) + len(answer.token_ids) - 1 for prompt, answer in pairs]
    shape = (len(pairs), max(lengths))
    inputs_BS, targets_BS = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    mask_BS, real_BS = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    logprobs_BS = torch.zeros(shape)
    for row, ((prompt, answer), length) in enumerate(zip(pairs, lengths, strict=True)):
        tokens = torch.tensor([*prompt, *answer.token_ids])
        inputs_BS[row, :length], targets_BS[row, :length] = tokens[:-1], tokens[1:]
        real_BS[row, :length] = True
        mask_BS[row, len(prompt) - 1 : length] = True
        logprobs_BS[row, len(prompt) - 1 : length] = torch.tensor(answer.logprobs.tolist())
    routes_BSLK = _collate_routes([answer.routes for _, answer in pairs], shape)
    return Rollouts(inputs_BS, targets_BS, mask_BS, real_BS, logprobs_BS, advantages_NG.reshape(-1), routes_BSLK)


def _collate_routes(routes: list[np.ndarray | None], shape: tuple[int, int]) -> Tensor | None:
    first = routes[0]
    if first is None:
        return None
    # Distinct ids, since a token that goes to the same expert twice is no valid routing anywhere downstream.
    padding_K = torch.arange(first.shape[-1])
    routes_BSLK = padding_K.expand(*shape, *first.shape[1:]).clone()
    for row, routes_RLK in enumerate(routes):
        assert routes_RLK is not None
        routes_BSLK[row, : len(routes_RLK)] = torch.from_numpy(routes_RLK.astype(np.int64))
    return routes_BSLK
