"""Calibration windows cover a text evenly and are run through the model one by one."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from moestro.errors import InputError
from moestro.models.windows import forward_windows, spread_windows


def test_windows_are_spread_over_the_whole_text() -> None:
    ids = np.arange(100, dtype=np.uint16)
    windows_NS = spread_windows(ids, length=10, max_tokens=50)
    assert windows_NS.dtype == torch.int64
    assert windows_NS[:, 0].tolist() == [0, 20, 40, 60, 80]
    assert all(row.tolist() == list(range(row[0], row[0] + 10)) for row in windows_NS)


def test_short_texts_give_what_they_have() -> None:
    ids = np.arange(25, dtype=np.uint32)
    assert spread_windows(ids, length=10, max_tokens=1000)[:, 0].tolist() == [0, 10]
    assert spread_windows(ids, length=100, max_tokens=1000).tolist() == [list(range(25))]
    with pytest.raises(InputError, match="no tokens"):
        spread_windows(ids[:0], length=10, max_tokens=50)


def test_every_window_goes_through_once_and_foreign_ids_are_refused() -> None:
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = AutoModelForCausalLM.from_config(config)
    seen = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].requires_grad))
    windows_NS = torch.arange(40).repeat(300, 1)
    batches = list(forward_windows(model, windows_NS))
    assert torch.equal(torch.cat(batches), windows_NS)
    assert seen == [False] * len(batches)
    assert len(batches) > 1
    with pytest.raises(InputError, match="vocabulary of 50"):
        next(forward_windows(model, torch.tensor([[50]])))
