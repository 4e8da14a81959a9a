"""Steering in vLLM against transformers for the other architectures that can be steered."""

import numpy as np
import pytest
import torch

from moestro.inference.engine import EngineConfig
from moestro.inference.steered_engine import SteeredEngine
from moestro.models.checkpoint import load_model
from moestro.models.steering_profiles import Profile
from moestro.steering.reference import renormalises, steered_logits

pytestmark = pytest.mark.slow

METHODS = {
    "suppress": {"layers": ((0, 1), (3,)), "parameters": {}},
    "boost": {"layers": ((2,), (4, 5)), "parameters": {"margin": 0.01}},
    "language": {"layers": ((), (1, 2)), "parameters": {"strength": 0.5, "threshold": 0.2}},
    "contrast": {"layers": ((), ()), "parameters": {"alpha": 1e-6, "beta": 0.5, "weak_rank": 3}},
}


@pytest.mark.parametrize("kind", ["qwen3_moe", "olmoe", "granitemoe"])
def test_every_steerable_architecture_is_served_as_its_reference(kind, tiny_moe, tmp_path):
    tiny_moe(kind).save_pretrained(tmp_path / "model")
    model = load_model(tmp_path / "model", experts="eager")
    shape = {"num_experts": 6, "top_k": 2, "renormalises": renormalises(model)}
    profiles = {
        name: Profile.model_validate(
            fields | shape | {"name": name, "method": name, "checkpoint": {"stage": "files", "fingerprint": "0"}}
        )
        for name, fields in METHODS.items()
    }
    for name, profile in profiles.items():
        (tmp_path / name).mkdir()
        profile.write(tmp_path / name)
    generator = np.random.default_rng(0)
    names = [None, *METHODS]
    sequences = [generator.integers(0, 320, size=30 + 7 * place).tolist() for place in range(len(names))]
    engine = SteeredEngine(
        tmp_path / "model", EngineConfig(max_model_len=128), {name: tmp_path / name for name in METHODS}
    )
    scores = engine.score(sequences, names)
    engine.close()
    for sequence, name, scored in zip(sequences, names, scores, strict=True):
        tokens = torch.tensor([sequence])
        logits = steered_logits(model, tokens, profiles[name] if name else None)[0, :-1]
        expected = logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0].numpy()
        possible = expected > -1000
        assert possible.mean() > 0.5
        assert np.abs(scored.logprobs - expected)[possible].max() <= 1e-4, name
