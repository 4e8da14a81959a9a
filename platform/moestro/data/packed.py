"""Token files as windows, and domains as batches whose position in the data is the step alone.

Shapes: B sequences of a batch, S positions, S' = S + 1 (inputs are [:, :-1], labels [:, 1:]).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import LongTensor

from moestro.errors import InputError

Ids = np.ndarray[Any, Any]


@dataclass(frozen=True)
class PackedTokens:
    """Documents back to back. `ids` is 1-D; `documents` are the offsets at which each begins."""

    ids: Ids
    documents: Ids

    @classmethod
    def open(cls, folder: Path, split: Literal["train", "held_out"]) -> "PackedTokens":
        """One side of a tokens artifact, mapped into memory; raises `InputError` if it is missing or damaged."""
        try:
            ids = np.load(folder / f"{split}.npy", mmap_mode="r")
            documents = np.load(folder / f"{split}_documents.npy", mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{folder} holds no readable {split} tokens: {error}.") from None
        return cls(ids, documents)

    @classmethod
    def of(cls, ids: Any) -> "PackedTokens":
        """Token ids from memory (sequence, array or tensor), as one document."""
        return cls(np.asarray(ids).reshape(-1), np.zeros(1, dtype=np.int64))

    def windows(self, length: int) -> LongTensor:
        """Consecutive windows without overlap, [N, length]; a shorter rest is left out.

        Raises `InputError` if there is not one whole window.
        """
        number = len(self.ids) // length
        if number == 0:
            raise InputError(
                f"{len(self.ids)} tokens do not fill one window of {length}.",
                hint="Add text to the domain, or shorten the sequences.",
            )
        return _long(self.ids[: number * length].reshape(number, length))


class Batch(NamedTuple):
    """`tokens_BS`: [B, S'] token ids; `domains_B`: [B] positions in the mixture's domains."""

    tokens_BS: LongTensor
    domains_B: LongTensor


class Mixture:
    """Domains in equal shares; each gives its windows in a seeded random order that is new in every epoch.

    Windows are S' tokens long and S apart, so every token but a domain's first is a label once an epoch.
    """

    def __init__(self, domains: Mapping[str, PackedTokens], sequence_length: int, seed: int) -> None:
        """Raises `InputError` for no domain, and for one that does not fill a window."""
        if not domains:
            raise InputError("A mixture needs at least one domain.")
        self.domains = dict(domains)
        self.sequence_length = sequence_length
        self.seed = seed
        self.num_windows = {name: (len(packed.ids) - 1) // sequence_length for name, packed in domains.items()}
        for name, number in self.num_windows.items():
            if number < 1:
                raise InputError(
                    f"Domain {name!r} has {len(domains[name].ids)} training tokens, fewer than one window "
                    f"of {sequence_length} + 1.",
                    hint="Add text to the domain, or lower `sequence_length`.",
                )
        self._orders: dict[str, tuple[int, Ids]] = {}

    def batch(self, step: int, batch_size: int) -> Batch:
        """The batch of `step` (from 0): a pure function of seed, step and batch size.

        Sequences go round the domains, across batches too, so shares are equal also where B is no multiple of them.
        """
        names = list(self.domains)
        rows, chosen = [], []
        for sequence in range(step * batch_size, (step + 1) * batch_size):
            turn, domain = divmod(sequence, len(names))
            rows.append(self._window(names[domain], turn))
            chosen.append(domain)
        return Batch(_long(np.stack(rows)), _long(np.asarray(chosen)))

    def _window(self, name: str, turn: int) -> Ids:
        """The domain's window number `turn`, counted over all epochs."""
        epoch, position = divmod(turn, self.num_windows[name])
        start = int(self._order(name, epoch)[position]) * self.sequence_length
        return self.domains[name].ids[start : start + self.sequence_length + 1]

    def _order(self, name: str, epoch: int) -> Ids:
        known = self._orders.get(name)
        if known is None or known[0] != epoch:
            # By name, so that a domain's order does not depend on which others there are.
            digest = hashlib.sha256(f"{self.seed}:{name}:{epoch}".encode()).digest()
            order = np.random.default_rng(int.from_bytes(digest[:8], "big")).permutation(self.num_windows[name])
            known = self._orders[name] = (epoch, order)
        return known[1]


def _long(array: Ids) -> LongTensor:
    return torch.from_numpy(array.astype(np.int64))  # type: ignore[return-value]
