"""Windows and mixtures: every window once an epoch, equal shares, and the step alone as position."""

from pathlib import Path

import numpy as np
import pytest
import torch

from moestro.data.packed import Mixture, PackedTokens
from moestro.errors import InputError

S = 8


def domains() -> dict[str, PackedTokens]:
    # Distinct ids everywhere, so that a window says where it comes from.
    return {"a": PackedTokens.of(np.arange(0, 101)), "b": PackedTokens.of(np.arange(1000, 1045))}


def test_windows_follow_each_other() -> None:
    windows = PackedTokens.of(torch.arange(20)).windows(6)
    assert windows.dtype == torch.int64
    assert windows.tolist() == [list(range(6)), list(range(6, 12)), list(range(12, 18))]
    with pytest.raises(InputError, match="20 tokens do not fill one window of 21"):
        PackedTokens.of(torch.arange(20)).windows(21)


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    mixture = Mixture(domains(), S, seed=3)
    batches = [mixture.batch(step, 5) for step in range(12)]
    for step in (7, 0, 11):
        fresh = Mixture(domains(), S, seed=3).batch(step, 5)
        assert torch.equal(fresh.tokens_BS, batches[step].tokens_BS)
        assert torch.equal(fresh.domains_B, batches[step].domains_B)
        assert torch.equal(mixture.batch(step, 5).tokens_BS, fresh.tokens_BS)
    assert not torch.equal(Mixture(domains(), S, seed=4).batch(0, 5).tokens_BS, batches[0].tokens_BS)


def test_shapes_shares_and_labels() -> None:
    batch = Mixture(domains(), S, seed=0).batch(0, 6)
    assert batch.tokens_BS.shape == (6, S + 1)
    assert batch.tokens_BS.dtype == batch.domains_B.dtype == torch.int64
    assert batch.domains_B.bincount().tolist() == [3, 3]
    assert ((batch.tokens_BS[:, 0] >= 1000).long() == batch.domains_B).all()
    assert (batch.tokens_BS[:, 1:] == batch.tokens_BS[:, :-1] + 1).all()


def test_shares_stay_equal_when_the_batch_is_no_multiple() -> None:
    mixture = Mixture(domains(), S, seed=0)
    chosen = torch.cat([mixture.batch(step, 5).domains_B for step in range(20)])
    assert chosen.bincount().tolist() == [50, 50]


def test_an_epoch_covers_each_window_once_and_the_next_in_another_order() -> None:
    mixture = Mixture({"a": domains()["a"]}, S, seed=0)
    number = (101 - 1) // S
    assert mixture.num_windows == {"a": number}
    epochs = [mixture.batch(epoch, number).tokens_BS[:, 0].tolist() for epoch in range(3)]
    for starts in epochs:
        assert sorted(starts) == [S * index for index in range(number)]
    assert epochs[0] != epochs[1] != epochs[2]
    labels = mixture.batch(0, number).tokens_BS[:, 1:].flatten().tolist()
    assert sorted(labels) == list(range(1, number * S + 1))


def test_a_batch_says_where_its_sequences_come_from() -> None:
    domains = {"a": PackedTokens.of(np.arange(100)), "b": PackedTokens.of(np.arange(1000, 1060))}
    data = Mixture(domains, 8, seed=3)
    for step in (0, 5, 40):
        sources, batch = data.sources(step, 3), data.batch(step, 3)
        begins = [int(domains[source.domain].ids[source.window * 8]) for source in sources]
        assert begins == batch.tokens_BS[:, 0].tolist()


def test_a_domains_order_does_not_depend_on_the_others() -> None:
    alone = Mixture({"b": domains()["b"]}, S, seed=0).batch(0, 5).tokens_BS
    both = Mixture(domains(), S, seed=0).batch(0, 10)
    assert torch.equal(both.tokens_BS[both.domains_B == 1], alone)


def test_too_short_and_missing_domains_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Domain 'c' has 8 training tokens, fewer than one window of 8 \+ 1"):
        Mixture({**domains(), "c": PackedTokens.of(np.arange(8))}, S, seed=0)
    assert Mixture({"c": PackedTokens.of(np.arange(9))}, S, seed=0).batch(5, 2).tokens_BS.shape == (2, S + 1)
    with pytest.raises(InputError, match="at least one domain"):
        Mixture({}, S, seed=0)
    with pytest.raises(InputError, match="no readable train tokens"):
        PackedTokens.open(tmp_path, "train")


def test_tokens_are_mapped_not_read(tmp_path: Path) -> None:
    np.save(tmp_path / "train.npy", np.arange(100, dtype=np.uint16))
    np.save(tmp_path / "train_documents.npy", np.zeros(1, dtype=np.int64))
    packed = PackedTokens.open(tmp_path, "train")
    assert isinstance(packed.ids, np.memmap)
    batch = Mixture({"a": packed}, S, seed=0).batch(0, 4)
    assert torch.equal(
        batch.tokens_BS, Mixture({"a": PackedTokens.of(np.arange(100))}, S, seed=0).batch(0, 4).tokens_BS
    )
