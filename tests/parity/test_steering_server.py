"""Profiles over HTTP: a server started with what the gateway says, and bodies as the gateway's hook makes them."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from moestro.artifacts import ArtifactStore, Input, Record, digest_files, fingerprint
from moestro.data.tokenizer import train_bpe
from moestro.inference.server import ServerConfig, VllmServer
from moestro.models.checkpoint import load_model
from moestro.models.steering_profiles import Profile
from moestro.steering.reference import greedy, steered_logits
from moestro_services.gateway.caller import LOCAL
from moestro_services.gateway.deployments import Deployment
from moestro_services.gateway.steering import Steering

pytestmark = pytest.mark.slow

CHECKPOINT = Input(stage="rl", fingerprint="c" * 64)
DEPLOYMENT = Deployment("tiny", "1", "d" * 64, CHECKPOINT, "float32", 128, 0)
METHODS: dict[str, dict[str, Any]] = {
    "quiet": {"method": "suppress", "layers": ((0, 1), (3,)), "parameters": {}},
    "sharp": {"method": "contrast", "layers": ((), ()), "parameters": {"alpha": 0.02, "beta": 0.5, "weak_rank": 3}},
}


def publish(store: ArtifactStore, name: str) -> Profile:
    shape = {"num_experts": 6, "top_k": 2, "renormalises": True, "checkpoint": CHECKPOINT.model_dump()}
    profile = Profile.model_validate(METHODS[name] | shape | {"name": name})
    identity = fingerprint("steer", "1", {"name": name}, {"model": CHECKPOINT.fingerprint})
    with store.work("steer", identity) as work:
        profile.write(work.out)
        record = Record(
            stage="steer",
            version="1",
            fingerprint=identity,
            inputs={"model": CHECKPOINT},
            config={"name": name},
            result={},
            files=digest_files(work.out),
            code_version="test",
            created_at=datetime(2026, 1, 1, tzinfo=UTC),
            seconds=1.0,
        )
        store.publish(work, record)
    return profile


class Served:
    """The server as the gateway asks it."""

    def __init__(self, server: VllmServer, steering: Steering, model: PreTrainedModel, profiles: dict[str, Profile]):
        headers = {"Authorization": f"Bearer {server.api_key}"}
        self.client = httpx.Client(base_url=server.url, timeout=120, trust_env=False, headers=headers)
        self.steering, self.model, self.profiles = steering, model, profiles

    def ask(self, prompt: list[int], name: str | None, **fields: Any) -> dict[str, Any]:
        own = {"steering_profile": name} if name else {}
        asked = {"model": "tiny", "prompt": prompt, "temperature": 0, "return_token_ids": True} | own | fields
        response = self.client.post("/v1/completions", json=self.steering.prepare(LOCAL, DEPLOYMENT, asked))
        assert response.status_code == 200, response.text
        choice: dict[str, Any] = response.json()["choices"][0]
        return choice


@pytest.fixture(scope="module")
def served(tiny_moe, tmp_path_factory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("steering_server")
    tiny_moe("mixtral").save_pretrained(folder / "model")
    train_bpe(["a steered answer to a question\n"] * 4, 300).save_pretrained(folder / "model")
    store = ArtifactStore(folder)
    profiles = {name: publish(store, name) for name in METHODS}
    steering = Steering(store)
    arguments, environment = steering.server_arguments(DEPLOYMENT)
    config = ServerConfig(
        name="tiny", max_model_len=128, extra_arguments=tuple(arguments), extra_environment=environment
    )
    with VllmServer(folder / "model", config, log=folder / "vllm.log") as server:
        server.start()
        yield Served(server, steering, load_model(folder / "model", experts="eager"), profiles)


def test_requests_over_http_follow_their_profiles(served):
    generator = np.random.default_rng(0)
    asked = [
        (generator.integers(1, 300, size=40 + 5 * place).tolist(), name)
        for place, name in enumerate(["quiet", None, "sharp", "quiet", "sharp", None])
    ]
    with ThreadPoolExecutor(len(asked)) as clients:
        scored = list(clients.map(lambda item: served.ask(*item, max_tokens=1, prompt_logprobs=0), asked))
        answered = list(clients.map(lambda item: served.ask(*item, max_tokens=8, ignore_eos=True), asked))
    for (prompt, name), scores, answer in zip(asked, scored, answered, strict=True):
        profile = served.profiles[name] if name else None
        tokens = torch.tensor([prompt])
        expected = steered_logits(served.model, tokens, profile)[0, :-1].log_softmax(-1)
        for place, token in enumerate(prompt[1:]):
            logprob = scores["prompt_logprobs"][place + 1][str(token)]["logprob"]
            if expected[place, token] > -1000:
                assert abs(logprob - float(expected[place, token])) <= 1e-4
            else:
                assert logprob < -1000
        assert answer["token_ids"] == greedy(served.model, prompt, profile, max_tokens=8)


def test_an_unknown_profile_is_refused_by_the_server_itself_which_lives_on(served):
    body = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 2, "vllm_xargs": {"moestro_profile": "other"}}
    response = served.client.post("/v1/completions", json=body)
    assert response.status_code == 400
    assert "no steering profile 'other'" in json.dumps(response.json())
    assert served.ask([1, 2, 3], "quiet", max_tokens=2)["finish_reason"]
