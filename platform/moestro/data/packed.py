"""Token files as windows, and domains as batches whose position in the data is the step alone.

Shapes: B sequences of a batch, S positions, S' = S + 1 (inputs are [:, :-1], labels [:, 1:]).
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import BoolTensor, LongTensor

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

    def starts(self, begin: int, length: int) -> Ids:
        """Of the `length` tokens from position `begin` on, which are the first of a document: [length], bool."""
        found = np.zeros(length, dtype=bool)
        first, last = np.searchsorted(self.documents, [begin, begin + length])
        found[self.documents[first:last] - begin] = True
        return found

    def beginning(self, tokens: int) -> "PackedTokens":
        """The first `tokens` tokens, or all if there are fewer."""
        return PackedTokens(self.ids[:tokens], self.documents[: np.searchsorted(self.documents, tokens)])

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
    """`tokens_BS`: [B, S'] token ids; `domains_B`: [B] positions in the mixture's domains; `starts_BS`: [B, S'] bool,
    the first tokens of documents.
    """

    tokens_BS: LongTensor
    domains_B: LongTensor
    starts_BS: BoolTensor


class Source(NamedTuple):
    """Where a sequence comes from: its domain and its window, whose tokens begin at S times its number."""

    domain: str
    window: int


class Mixture:
    """Domains in fixed shares; each gives its windows in a seeded random order that is new in every epoch.

    Windows are S' tokens long and S apart, so every token but a domain's first is a label once an epoch.

    Shares are kept by rule, not by chance. Of a run of n sequences the first domain has ceil(n p), p its share, those
    that are spread most evenly (Beatty sequences); the sequences in between are dealt to the other domains in the same
    way. So at any moment a domain has its share to within less than one sequence for each domain up to it, and with
    equal shares domains simply take turns.
    """

    def __init__(
        self,
        domains: Mapping[str, PackedTokens],
        sequence_length: int,
        seed: int,
        shares: Mapping[str, float | Fraction] | None = None,
    ) -> None:
        """`shares` are the domains' weights, by name, whatever they add up to; without them all are equal.

        Raises `InputError` for no domain, for one that does not fill a window, and for shares that are not positive.
        """
        if not domains:
            raise InputError("A mixture needs at least one domain.")
        self._shares = _remaining_shares(dict.fromkeys(domains, 1) if shares is None else shares, list(domains))
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

        Shares are kept over all sequences, so they are right in the long run whatever B is.
        """
        names = list(self.domains)
        rows, starts, chosen = [], [], []
        for sequence in range(step * batch_size, (step + 1) * batch_size):
            domain, turn = self._whose(sequence)
            window, begins = self._window(names[domain], turn)
            rows.append(window)
            starts.append(begins)
            chosen.append(domain)
        return Batch(_long(np.stack(rows)), _long(np.asarray(chosen)), torch.from_numpy(np.stack(starts)))  # type: ignore[arg-type]

    def sources(self, step: int, batch_size: int) -> list[Source]:
        """Where the sequences of that batch come from, in its order."""
        names = list(self.domains)
        dealt = (self._whose(sequence) for sequence in range(step * batch_size, (step + 1) * batch_size))
        return [Source(names[domain], self._place(names[domain], turn)) for domain, turn in dealt]

    def epochs(self, steps: int, batch_size: int) -> dict[str, float]:
        """How often `steps` batches go through each domain's windows."""
        sequences = steps * batch_size
        return {
            name: self._given(domain, sequences) / self.num_windows[name] for domain, name in enumerate(self.domains)
        }

    def identity(self) -> dict[str, Any]:
        """What decides the batches, but for the tokens' contents, as JSON values."""
        return {
            "domains": {name: len(packed.ids) for name, packed in self.domains.items()},
            "shares": [str(share) for share in self._shares],
            "sequence_length": self.sequence_length,
            "seed": self.seed,
        }

    def _given(self, domain: int, sequences: int) -> int:
        """How many of the first `sequences` the domain gives."""
        for before, share in enumerate(self._shares):
            given = math.ceil(sequences * share)
            if before == domain:
                return given
            sequences -= given
        raise AssertionError("there is no such domain")

    def _whose(self, sequence: int) -> tuple[int, int]:
        """Which domain gives this sequence (from 0), and how many it has given before."""
        for domain, share in enumerate(self._shares):
            given, then = math.ceil(sequence * share), math.ceil((sequence + 1) * share)
            if then > given:
                return domain, given
            sequence -= given
        raise AssertionError("the last domain takes all that is left")

    def _window(self, name: str, turn: int) -> tuple[Ids, Ids]:
        """The domain's window number `turn`, counted over all epochs, and where documents start in it."""
        start = self._place(name, turn) * self.sequence_length
        length, packed = self.sequence_length + 1, self.domains[name]
        return packed.ids[start : start + length], packed.starts(start, length)

    def _place(self, name: str, turn: int) -> int:
        """Where in the domain's text, counted in windows, that window is."""
        epoch, position = divmod(turn, self.num_windows[name])
        return int(self._order(name, epoch)[position])

    def _order(self, name: str, epoch: int) -> Ids:
        known = self._orders.get(name)
        if known is None or known[0] != epoch:
            # By name, so that a domain's order does not depend on which others there are.
            digest = hashlib.sha256(f"{self.seed}:{name}:{epoch}".encode()).digest()
            order = np.random.default_rng(int.from_bytes(digest[:8], "big")).permutation(self.num_windows[name])
            known = self._orders[name] = (epoch, order)
        return known[1]


def _remaining_shares(shares: Mapping[str, float | Fraction], names: list[str]) -> list[Fraction]:
    """Each domain's share of what those before it leave; a float counts as the decimal it is written as."""
    if set(shares) != set(names):
        raise InputError(f"The shares are of {sorted(shares)}, the domains are {sorted(names)}.")
    if bad := [name for name in names if not (math.isfinite(shares[name]) and shares[name] > 0)]:
        raise InputError(f"The share of {bad[0]} is {shares[bad[0]]}, which is not above 0.")
    exact = [Fraction(str(shares[name])) for name in names]
    return [share / sum(exact[position:]) for position, share in enumerate(exact)]


def _long(array: Ids) -> LongTensor:
    return torch.from_numpy(array.astype(np.int64))  # type: ignore[return-value]
