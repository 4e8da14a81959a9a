"""Steered requests in vLLM against transformers: log-probabilities, routes and greedy tokens, in batches of all kinds.

The engine takes 64 tokens per step, so that longer prompts are prefilled in chunks, and keeps prefixes.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from moestro.errors import InputError
from moestro.inference.engine import Completion, EngineConfig, Sampling, Scored, VllmEngine
from moestro.inference.steered_engine import SteeredEngine
from moestro.models.checkpoint import load_model
from moestro.models.routing import record_routes
from moestro.models.steering_profiles import Method, Profile
from moestro.steering.reference import greedy, steered, steered_logits

pytestmark = pytest.mark.slow

MAX_LEN = 400
NEVER = -1000.0
"""Below it lie the log-probabilities of tokens that contrast rules out."""
KINDS = {"mixtral": True, "qwen2_moe": False}
"""Whether the gates add up to one; the second has a shared expert besides."""
METHODS: dict[str, dict[str, Any]] = {
    "suppress": {"method": "suppress", "layers": ((0, 1), (), (3,)), "parameters": {}},
    "suppress all": {"method": "suppress", "layers": ((0, 1, 2, 3, 4, 5), (), ()), "parameters": {}},
    "boost": {"method": "boost", "layers": ((2,), (4, 5), ()), "parameters": {"margin": 0.01}},
    "language": {"method": "language", "layers": ((), (1, 2), ()), "parameters": {"strength": 0.5, "threshold": 0.2}},
    "contrast": {
        "method": "contrast",
        "layers": ((), (), ()),
        "parameters": {"alpha": 0.02, "beta": 0.5, "weak_rank": 3},
    },
    "own rank": {
        "method": "contrast",
        "layers": ((), (), ()),
        "parameters": {"alpha": 0.005, "beta": 1.5, "weak_rank": 2},
    },
}
MIXED = ["contrast", None, "suppress", "boost", None, "own rank", "language", "contrast", None, "suppress all"]


class ChunkingEngine(SteeredEngine):
    def _further_arguments(self) -> dict[str, Any]:
        return super()._further_arguments() | CHUNKS


class ChunkingPlainEngine(VllmEngine):
    def _further_arguments(self) -> dict[str, Any]:
        return CHUNKS


CHUNKS = {"max_num_batched_tokens": 64, "max_num_seqs": 16}


class World:
    """A model, its profiles, and what transformers says."""

    def __init__(self, kind: str, tiny_moe: Any, folder: Path) -> None:
        model = tiny_moe(kind, num_hidden_layers=3, vocab_size=512, norm_topk_prob=False, max_position_embeddings=512)
        self.folder = folder / "model"
        model.save_pretrained(self.folder)
        fields = {"num_experts": 6, "top_k": 2, "renormalises": KINDS[kind]}
        fields["checkpoint"] = {"stage": "files", "fingerprint": "0"}
        self.profiles = {name: Profile.model_validate(METHODS[name] | fields | {"name": name}) for name in METHODS}
        self.files: dict[str, Path] = {}
        for name, profile in self.profiles.items():
            self.files[name] = folder / name
            self.files[name].mkdir()
            profile.write(self.files[name])
        self.model: PreTrainedModel = load_model(self.folder, experts="eager")

    def score(self, sequence: list[int], name: str | None) -> Scored:
        profile, tokens = self.profiles[name] if name else None, torch.tensor([sequence])
        logprobs = steered_logits(self.model, tokens, profile)[0, :-1].log_softmax(-1)
        # What a contrasted request's routes tell is the strong pass, which nothing steers.
        own = profile if profile and profile.method != Method.CONTRAST else None
        with torch.no_grad(), record_routes(self.model) as record:
            if own:
                with steered(self.model, own):
                    self.model(input_ids=tokens)
            else:
                self.model(input_ids=tokens)
        return Scored(logprobs.gather(1, tokens[0, 1:, None])[:, 0].numpy(), record.routes().numpy())

    def check(self, scored: Scored, sequence: list[int], name: str | None) -> None:
        expected = self.score(sequence, name)
        possible = expected.logprobs > NEVER
        assert np.abs(scored.logprobs - expected.logprobs)[possible].max(initial=0) <= 1e-4
        assert (scored.logprobs[~possible] < NEVER).all()
        assert possible.any()
        assert np.array_equal(np.sort(scored.routes, -1), np.sort(expected.routes, -1))

    def check_tokens(self, answer: Completion, prompt: list[int], name: str | None) -> None:
        profile = self.profiles[name] if name else None
        assert answer.token_ids == greedy(self.model, prompt, profile, max_tokens=len(answer.token_ids))


def sequences() -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 512, size=size).tolist() for size in (130, 17, 33, 64, 200, 150, 8, 300, 90, 40)]


def sampling(**fields: Any) -> Sampling:
    return Sampling(**{"n": 1, "temperature": 0.0, "seed": 0, "stop_token_ids": [], "max_tokens": 10} | fields)


@pytest.fixture(scope="module", params=KINDS)
def world(request, tiny_moe, tmp_path_factory) -> World:
    return World(request.param, tiny_moe, tmp_path_factory.mktemp("steering"))


@pytest.fixture(scope="module")
def plain(world) -> tuple[list[Scored], list[list[int]]]:
    """What vLLM says without steering: scores and greedy tokens. (A process holds one engine at a time.)"""
    engine = ChunkingPlainEngine(world.folder, EngineConfig(routes=True, max_model_len=MAX_LEN))
    answers = engine.score(sequences()), [group[0].token_ids for group in engine.generate(sequences(), sampling())]
    engine.close()
    return answers


@pytest.fixture(scope="module")
def engine(world, plain):
    engine = ChunkingEngine(world.folder, EngineConfig(routes=True, max_model_len=MAX_LEN), world.files)
    yield engine
    engine.close()


@pytest.mark.parametrize("name", METHODS)
def test_scores_and_routes_are_those_of_the_reference(world, engine, name):
    chosen = sequences()[:4]
    for sequence, scored in zip(chosen, engine.score(chosen, [name] * 4), strict=True):
        world.check(scored, sequence, name)


def test_every_request_of_a_mixed_batch_follows_its_own_profile(world, engine):
    for sequence, name, scored in zip(sequences(), MIXED, engine.score(sequences(), MIXED), strict=True):
        world.check(scored, sequence, name)


def test_greedy_tokens_are_those_of_the_reference(world, engine):
    groups = engine.generate(sequences(), sampling(), MIXED)
    for prompt, name, (answer,) in zip(sequences(), MIXED, groups, strict=True):
        world.check_tokens(answer, prompt, name)


def test_sampled_tokens_carry_the_log_probability_of_the_steered_distribution(world, engine):
    groups = engine.generate(sequences(), sampling(n=2, temperature=0.7, seed=3), MIXED)
    for prompt, name, group in zip(sequences(), MIXED, groups, strict=True):
        for answer in group:
            tokens = torch.tensor([prompt + answer.token_ids])
            profile = world.profiles[name] if name else None
            logits = steered_logits(world.model, tokens, profile)[0, len(prompt) - 1 : -1] / 0.7
            expected = logits.log_softmax(-1).gather(1, tokens[0, len(prompt) :, None])[:, 0].numpy()
            assert np.abs(answer.logprobs - expected).max() <= 1e-4


def same(one: list[Scored], other: list[Scored]) -> list[bool]:
    return [
        np.array_equal(first.logprobs, second.logprobs) and np.array_equal(first.routes, second.routes)
        for first, second in zip(one, other, strict=True)
    ]


def test_requests_without_a_profile_are_answered_as_by_plain_vllm_to_the_bit(plain, engine):
    expected, tokens = plain
    assert all(same(engine.score(sequences()), expected))
    assert [group[0].token_ids for group in engine.generate(sequences(), sampling())] == tokens
    untouched = [name is None for name in MIXED]
    agreeing = same(engine.score(sequences(), MIXED), expected)
    assert [equal for equal, own in zip(agreeing, untouched, strict=True) if own] == [True] * sum(untouched)
    assert not any(equal for equal, own in zip(agreeing, untouched, strict=True) if not own)


def test_a_cached_prefix_is_used_under_its_own_profile_alone(world, engine):
    prompt = sequences()[7]
    order = ["suppress", "boost", "contrast", None, "own rank", "suppress", None, "contrast", "boost", "own rank"]
    engine._llm.reset_prefix_cache()
    cached = []
    for name in order:
        answer, hits = ask(engine, prompt, name)
        world.check_tokens(answer, prompt, name)
        cached.append(hits > 0)
    assert cached == [name in order[:place] for place, name in enumerate(order)]


def ask(engine: SteeredEngine, prompt: list[int], name: str | None, *, salted: bool = True) -> tuple[Completion, int]:
    """One greedy answer on top of what is cached, and how many tokens came from the cache."""
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=6, temperature=0.0, ignore_eos=True, detokenize=False, logprobs=0, flat_logprobs=True
    )
    with engine._following([prompt], [name]):
        requests, own = engine._requests([prompt], params)
    if not salted:
        requests[0].pop("cache_salt")
    (output,) = engine._llm.generate(requests, own, use_tqdm=False)
    return engine._completion(len(prompt), output.outputs[0]), output.num_cached_tokens


def test_without_a_salt_a_request_would_read_what_another_profile_left(world, engine):
    """The control: what the salt is for."""
    prompt = sequences()[7]
    engine._llm.reset_prefix_cache()
    right, _ = ask(engine, prompt, "suppress all")
    ask(engine, prompt, None)
    wrong, hits = ask(engine, prompt, "suppress all", salted=False)
    assert hits > 0
    assert not np.array_equal(right.logprobs, wrong.logprobs)


def test_what_an_engine_does_not_know_is_refused(world, engine):
    with pytest.raises(InputError, match="no steering profile 'other'"):
        engine.score([[1, 2, 3]], ["other"])
    with pytest.raises(InputError, match="1 profiles for 2 prompts"):
        engine.score([[1, 2, 3], [1, 2]], ["boost"])
