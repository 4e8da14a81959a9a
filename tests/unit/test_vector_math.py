"""MKL's functions are called by one thread before many call them, in whatever computes: a race cannot be tested, that
it cannot come about can."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from moestro.inference.environment import quiet_environment, server_environment
from moestro_kernels.vector_math import settle_vector_math

SEEN = """
import sys
from pathlib import Path
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from moestro.models.checkpoint import load_model
from moestro.training.runtime import deterministic
from moestro_kernels.vector_math import FUNCTIONS

class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").rstrip("_")
        if name in FUNCTIONS:
            sizes.setdefault((name, args[0].dtype), []).append(args[0].numel())
        return function(*args, **(kwargs or {}))

sizes = {}
with Seen():
    exec(sys.argv[1])
many = {key: found for key, found in sizes.items() if max(found) > 1}
assert many, sizes
assert all(found[0] == 1 for found in many.values()), many
"""
LOADED = "load_model(Path(sys.argv[2]))(torch.arange(64)[None])"
DETERMINISTIC = """
with deterministic():
    torch.ones(64).sqrt()
"""


@pytest.mark.parametrize("computes", [LOADED, DETERMINISTIC], ids=["loaded", "deterministic"])
def test_the_first_call_of_a_process_is_one_threads(tmp_path: Path, computes: str) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=64, num_key_value_heads=1, num_local_experts=2, **sizes)
    model: nn.Module = MixtralForCausalLM(config)
    model.save_pretrained(tmp_path)
    command = [sys.executable, "-c", SEEN, computes, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_vllm_finds_it_among_its_plugins() -> None:
    from vllm.plugins import DEFAULT_PLUGINS_GROUP, load_plugins_by_group

    assert load_plugins_by_group(DEFAULT_PLUGINS_GROUP)["moestro"] is settle_vector_math


@pytest.mark.parametrize(
    ("named", "wanted"), [(None, None), ("", "moestro"), ("a,b", "a,b,moestro"), ("moestro", "moestro")]
)
def test_a_list_of_plugins_names_it_too(monkeypatch: pytest.MonkeyPatch, named: str | None, wanted: str | None) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if named is not None:
        monkeypatch.setenv("VLLM_PLUGINS", named)
    assert server_environment().get("VLLM_PLUGINS") == wanted
    quiet_environment()
    assert os.environ.get("VLLM_PLUGINS") == wanted
