"""A home with a small lifecycle's records in it; `FixedUpstream`, which speaks the part of vLLM's API needed, and
`FixedServer`, a process that is not one."""

import asyncio
import json
import secrets
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from moestro.artifacts import Artifact, ArtifactStore, Input, LifecycleRun, Record, StepRun, digest_files, fingerprint
from moestro.config import LifecycleConfig, validate
from moestro.errors import ResourceError
from moestro.registry.model_versions import ModelVersion, RegisteredModel
from moestro_flows.home import Home
from moestro_services.gateway.deployments import Deployment
from moestro_services.gateway.fleet import Fleet
from moestro_services.gateway.listening import listen, serving
from moestro_services.gateway.replica import Backoff

NO_TEMPLATE = {"error": {"message": "no chat template", "type": "BadRequestError", "param": None, "code": 400}}


class FixedUpstream:
    """An ASGI application that answers every completion with fixed bytes; prompts steer it.

    `wait`: never begins to answer; `endless`: streams until the client leaves; `break`: drops the connection midway;
    `die`: drops it after the head of the answer; `fail`: a 500; `hold`: begins when `go` is set; `begin CODE` and
    `end CODE`: a stream that begins or ends with an error.
    """

    def __init__(self, fingerprint: str = "assistant@1") -> None:
        self.url = ""
        self.well = True
        self.api_key = ""
        self.seen: list[tuple[str, dict[str, str], bytes]] = []
        self.began = threading.Event()
        self.left = threading.Event()
        self.go = threading.Event()
        said = b'{"id":"cmpl-1","system_fingerprint":"%s","choices":[{"index":0,"text":"%%s"}]' % fingerprint.encode()
        usage = b',"usage":{"prompt_tokens":5,"total_tokens":7,"completion_tokens":2}}'
        self.answer = said % b" 19" + usage
        self.events = tuple(b"data: " + said % part + b"}\n\n" for part in (b" 1", b"9", b"!"))
        self.usage_event = b'data: {"id":"cmpl-1","choices":[]' + usage + b"\n\n"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        body = await Request(scope, receive).body()
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        if scope["path"] == "/health":
            await _reply(send, b"", status=200 if self.well else 503)
            return
        if headers.get("authorization") != f"Bearer {self.api_key}":
            await _reply(send, b'{"error":"Unauthorized"}', status=401)
            return
        self.seen.append((scope["path"], headers, body))
        await self._answer(scope, json.loads(body), receive, send)

    async def _answer(self, scope: Scope, asked: dict[str, Any], receive: Receive, send: Send) -> None:
        if asked.get("prompt") == "hold":
            self.began.set()
            await asyncio.to_thread(self.go.wait, 30)
        if asked.get("prompt") == "fail":
            await _reply(send, b'{"error":{"message":"no","code":500}}', status=500)
        elif asked.get("prompt") == "die":
            await send(_start(200, b"application/json", (b"content-length", b"1000")))
        elif scope["path"] == "/v1/chat/completions":
            await _reply(send, json.dumps(NO_TEMPLATE).encode(), status=400)
        elif asked["prompt"] == "wait":
            self.began.set()
            await self._gone(receive)
        elif asked.get("stream"):
            await self._stream(asked, receive, send)
        elif asked["prompt"] == "break":
            await send(_start(200, b"application/json", (b"content-length", b"1000")))
            await send({"type": "http.response.body", "body": b'{"id":', "more_body": True})
        else:
            await _reply(send, self.answer)

    async def _stream(self, asked: dict[str, Any], receive: Receive, send: Send) -> None:
        prompt = asked["prompt"]
        await send(_start(200, b"text/event-stream; charset=utf-8"))
        when, _, code = prompt.partition(" ")
        error = b'data: {"error": {"message": "no", "type": "", "param": null, "code": %s}}\n\n' % code.encode()
        for event in (error,) if when == "begin" else (*self.events, error) if when == "end" else self.events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        if prompt == "endless":
            self.began.set()
            await self._gone(receive)
        elif prompt != "break":
            usage = self.usage_event if asked.get("stream_options") else b""
            await send({"type": "http.response.body", "body": usage + b"data: [DONE]\n\n"})

    async def _gone(self, receive: Receive) -> None:
        async with asyncio.timeout(30):
            while (await receive())["type"] != "http.disconnect":
                pass
        self.left.set()


def _start(status: int, kind: bytes, *more: tuple[bytes, bytes]) -> Message:
    headers = [(b"content-type", kind), (b"x-secret", b"stays here"), *more]
    return {"type": "http.response.start", "status": status, "headers": headers}


async def _reply(send: Send, body: bytes, *, status: int = 200) -> None:
    await send(_start(status, b"application/json"))
    await send({"type": "http.response.body", "body": body})


class FixedServer:
    """A `ModelServer` whose process is a flag and whose answers are `upstream`'s; each start has a key of its own.

    Starting waits for `may_start` and fails while `refusals` are left.
    """

    def __init__(self, upstream: FixedUpstream | None = None, *, refusals: int = 0, started: bool = True) -> None:
        self.upstream = upstream or FixedUpstream()
        self.refusals = refusals
        self.api_key = ""
        self.port = 1
        self.starts = 0
        self.stops = 0
        self.well = True
        self.may_start = threading.Event()
        self.gone = threading.Event()
        if started:
            self.may_start.set()

    @property
    def url(self) -> str:
        return self.upstream.url

    def start(self, timeout: float = 30) -> None:
        self.starts += 1
        assert self.may_start.wait(timeout)
        if self.refusals:
            self.refusals -= 1
            raise ResourceError("No memory.\nthe log")
        self.gone.clear()
        self.api_key = self.upstream.api_key = secrets.token_hex(8)

    def healthy(self) -> bool:
        return self.well

    def wait(self, timeout: float | None = None) -> bool:
        return self.gone.wait(timeout)

    def stop(self) -> None:
        self.stops += 1
        self.gone.set()


class FixedModels:
    """A model registry that is a list, and the servers of its versions."""

    def __init__(self, servers: dict[str, FixedServer]) -> None:
        self.servers = servers
        """By version."""

    def open(self, version: ModelVersion) -> tuple[Deployment, FixedServer]:
        return deployment_of(version.version), self.servers[version.version]

    def model(self, share: float = 0.0, **aliases: str) -> RegisteredModel:
        """The model `assistant` with these aliases."""
        versions = (
            ModelVersion("assistant", number, "deploy", deployment_of(number).fingerprint, STARTED, {})
            for number in self.servers
        )
        return RegisteredModel("assistant", tuple(versions), aliases, share)


def deployment_of(version: str) -> Deployment:
    """The deployment of one version of `assistant`."""
    return Deployment(
        name="assistant",
        version=version,
        fingerprint=version * 64,
        checkpoint=Input(stage="compress", fingerprint="c" * 64),
        dtype="float32",
        max_model_len=512,
        created=1_700_000_000,
    )


@pytest.fixture
def fixed() -> type[FixedModels]:
    return FixedModels


@pytest.fixture
def fixed_server() -> type[FixedServer]:
    return FixedServer


@pytest.fixture
def upstream() -> Iterator[FixedUpstream]:
    fixed = FixedUpstream()
    with serving(fixed, listen("127.0.0.1", 0)) as url:
        fixed.url = url
        yield fixed


@pytest.fixture
def second_upstream() -> Iterator[FixedUpstream]:
    fixed = FixedUpstream("assistant@2")
    with serving(fixed, listen("127.0.0.1", 0)) as url:
        fixed.url = url
        yield fixed


@pytest.fixture
def models(upstream: FixedUpstream, second_upstream: FixedUpstream) -> FixedModels:
    """Versions 1 and 2 of `assistant`, each with its upstream."""
    return FixedModels({"1": FixedServer(upstream), "2": FixedServer(second_upstream)})


@pytest.fixture
def fleet(models: FixedModels) -> Iterator[Fleet]:
    """Serves version 1 of `assistant`."""
    with Fleet(models.open, backoff=Backoff(first=0.0)) as made:
        made.apply([models.model(champion="1")])
        assert made.wait_for(lambda fleet: all(fleet.ready.values()), 30)
        yield made


CONFIG = """
name: small
data:
  domains:
    - {name: code, source: {type: builtin, name: stdlib}}
    - {name: prose, source: {type: builtin, name: docs}}
seed: {type: pretrain, training: {steps: 30}}
branch: {training: {steps: 20}}
tune: {training: {steps: 20}}
rl: {task: {name: chain_sum}}
compress: {num_experts: 2}
deploy: {}
"""
DOMAINS = ("code", "prose")
STARTED = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)


class HomeBuilder:
    """Publishes artifacts as a lifecycle would, with the layouts of the real ones and figures made up."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.steps: list[StepRun] = []

    def add(
        self, name: str, inputs: dict[str, Artifact], *, result: Any = None, files: dict[str, Any] | None = None
    ) -> Artifact:
        """Publish one step's artifact; JSON values and dictionaries of arrays become files."""
        stage = name.partition(" ")[0]
        roles = {role: Input(stage=item.stage, fingerprint=item.fingerprint) for role, item in inputs.items()}
        identity = fingerprint(stage, "1", {"name": name}, {role: item.fingerprint for role, item in roles.items()})
        store = self.home.store
        with store.work(stage, identity) as work:
            for path, content in (files or {"config.json": {"model_type": "mixtral"}}).items():
                if path.endswith(".safetensors"):
                    save_file(content, work.out / path)
                else:
                    (work.out / path).write_text(json.dumps(content))
            record = Record(
                stage=stage,
                version="1",
                fingerprint=identity,
                inputs=roles,
                config={"name": name},
                result=result or {},
                files=digest_files(work.out),
                code_version="0.1.0",
                created_at=STARTED + timedelta(minutes=len(self.steps)),
                seconds=3.5,
            )
            artifact = store.publish(work, record)
        step = StepRun(
            name=name, stage=stage, fingerprint=identity, status="completed", started_at=STARTED, seconds=3.5
        )
        self.steps.append(step)
        return artifact

    def measure(self, name: str, model: Artifact, origins: list[str] | None = None) -> None:
        """Evaluate a checkpoint, and profile it if it has experts."""
        losses = {"code": 2.0 - 0.05 * len(self.steps), "prose": 3.0 - 0.05 * len(self.steps)}
        result = {"held_out_loss": losses, "geometric_mean_perplexity": 9.5, "task_accuracy": 0.25, "tokens": {}}
        sample = {"prompt": "Question: <b>1 + 1</b>?\nAnswer:", "answer": "2", "completion": " 2\n", "score": 1.0}
        self.add(
            f"evaluate {name}",
            {"model": model},
            result=result,
            files={"evaluation.json": {"held_out_loss": losses, "task": None, "samples": [sample]}},
        )
        if origins:
            specialisation = {"code": 1.4, "prose": 1.2 if "prose" in origins else None}
            figures = {"dead_experts": 0, "max_violation": 0.4, "specialisation": specialisation}
            files = {"routing.safetensors": routing(origins), "experts.json": {"origins": [origins] * 2}}
            self.add(f"profile {name}", {"model": model}, result=figures, files=files)

    def finish(self, status: Any = "completed") -> LifecycleRun:
        """Write the run's record."""
        config = validate(LifecycleConfig, yaml.safe_load(CONFIG), where="test").model_dump(mode="json")
        run = LifecycleRun(
            id="20260102-030400-abcd",
            name="small",
            status=status,
            config=config,
            started_at=STARTED,
            seconds=75.0,
            steps=tuple(self.steps),
        )
        run.write(self.home.runs)
        return run


def routing(origins: list[str]) -> dict[str, np.ndarray]:
    """100 tokens per domain, each choosing two experts: all of them the seed's, most of them the domain's own."""
    tensors = {}
    for domain in DOMAINS:
        counts = np.zeros((2, len(origins)), np.int64)
        counts[:, -1] = 100
        counts[:, :-1] = 20 if len(origins) > 2 else 100
        if domain in origins and len(origins) > 2:
            counts[:, origins.index(domain)] = 80
        tensors[f"counts/{domain}"] = counts
        tensors[f"gate_mass/{domain}"] = counts / 2
        tensors[f"coactivation/{domain}"] = np.stack([np.diag(row) for row in counts])
        tensors[f"tokens/{domain}"] = np.array([100])
    return tensors


@pytest.fixture
def built_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A home after one complete lifecycle of two domains; MOESTRO_HOME points to it."""
    home = Home(tmp_path / "home")
    monkeypatch.setenv("MOESTRO_HOME", str(home.path))
    build = HomeBuilder(home)
    history = {"steps": [{"step": step, "loss": 4.0 / step, "learning_rate": 1e-3} for step in range(1, 6)]}
    rewards = {"steps": [{"step": step, "reward": step / 10, "reward_std": 0.2} for step in range(1, 6)]}
    trained = {"config.json": {}, "history.json": history}
    corpora = {name: build.add(f"corpus {name}", {}) for name in DOMAINS}
    seed = build.add("seed", {f"corpora/{name}": item for name, item in corpora.items()}, files=trained)
    tokens = {name: build.add(f"tokens {name}", {"corpus": corpora[name], "seed": seed}) for name in DOMAINS}
    build.measure("seed", seed)
    branches = {
        name: build.add(f"branch {name}", {"seed": seed, "tokens": tokens[name]}, files=trained) for name in DOMAINS
    }
    origins = ["code", "prose", "seed"]
    mix = build.add("mix", {"seed": seed} | {f"branches/{name}": item for name, item in branches.items()})
    build.measure("mix", mix, origins)
    tune = build.add("tune", {"model": mix}, files=trained)
    build.measure("tune", tune, origins)
    learnt = {"reward_first": 0.15, "reward_last": 0.45}
    rl = build.add("rl", {"model": tune}, result=learnt, files={"config.json": {}, "history.json": rewards})
    build.measure("rl", rl, origins)
    sizes = {"before": {"size_bytes": 4_000_000}, "after": {"size_bytes": 3_000_000}}
    compressed = build.add("compress", {"model": rl}, result=sizes)
    build.measure("compress", compressed, ["code", "seed"])
    gate = {"max_logprob_difference": 1e-5, "routing_agreement": 1.0}
    served = {
        "name": "assistant",
        "checkpoint": {"stage": "compress", "fingerprint": compressed.fingerprint},
        "dtype": "float32",
        "max_model_len": 512,
        "gates": {"parity": {"figures": gate, "passed": True}},
    }
    build.add("deploy", {"model": compressed}, result=gate, files={"deployment.json": served})
    build.finish()
    return home


@pytest.fixture(scope="session")
def tiny_mixtral() -> Callable[..., None]:
    """Makes a random Mixtral, with a tokenizer, that a real vLLM serves."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    from moestro.data.tokenizer import train_bpe

    def make(out: Path, *, seed: int, chat_template: str | None = None) -> None:
        tokenizer = train_bpe(["Question: What is 12 + 7?\nAnswer: 19\n"] * 4, 300)
        tokenizer.chat_template = chat_template
        torch.manual_seed(seed)
        config = MixtralConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=128,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
        MixtralForCausalLM(config).save_pretrained(out)
        tokenizer.save_pretrained(out)

    return make


@pytest.fixture
def deploy_tiny(tiny_mixtral: Callable[..., None]) -> Callable[..., Artifact]:
    """Publishes a tiny Mixtral and a deployment of it, named `tiny`, in a home."""

    def publish(
        store: ArtifactStore, stage: str, inputs: dict[str, Input], fill: Callable[[Path], Any], seed: int
    ) -> Artifact:
        identity = fingerprint(stage, "1", {"seed": seed}, {role: item.fingerprint for role, item in inputs.items()})
        with store.work(stage, identity) as work:
            fill(work.out)
            record = Record(
                stage=stage,
                version="1",
                fingerprint=identity,
                inputs=inputs,
                config={"seed": seed},
                result={},
                files=digest_files(work.out),
                code_version="0.1.0",
                created_at=STARTED,
                seconds=1.0,
            )
            return store.publish(work, record)

    def deploy(home: Path, *, seed: int) -> Artifact:
        store = ArtifactStore(home)
        model = publish(store, "compress", {}, partial(tiny_mixtral, seed=seed), seed)
        checkpoint = Input(stage="compress", fingerprint=model.fingerprint)
        served = {"name": "tiny", "checkpoint": checkpoint.model_dump(), "dtype": "float32", "max_model_len": 64}
        fill = partial(_write, served)
        return publish(store, "deploy", {"model": checkpoint}, fill, seed)

    return deploy


def _write(served: dict[str, Any], out: Path) -> None:
    (out / "deployment.json").write_text(json.dumps(served))


UNCOMPARED = {
    "quality": {"thresholds": {"max_loss_increase": None, "max_accuracy_drop": None}},
    "latency": {"thresholds": {"max_ratio": None}},
    "memory": {"thresholds": {"max_ratio": None}},
}
"""Gates that compare nothing with the champion."""


class Deploying:
    """A home with MLflow, in which deployments of made up checkpoints are published."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self._build = HomeBuilder(home)

    def __call__(self, letter: str, **content: Any) -> Artifact:
        """The deployment of a checkpoint of its own; `content` goes into `deployment.json`."""
        checkpoint = self._build.add(f"compress {letter}", {})
        served = {"name": "assistant", "dtype": "float32", "max_model_len": 512, "gates": UNCOMPARED} | content
        served["checkpoint"] = {"stage": "compress", "fingerprint": checkpoint.fingerprint}
        files = {"deployment.json": served}
        return self._build.add(f"deploy {letter}", {"model": checkpoint}, result={"load_seconds": 1.5}, files=files)


@pytest.fixture
def deploying_in() -> type[Deploying]:
    return Deploying


@pytest.fixture
def deploying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepare_mlflow: Callable[[Path], None]) -> Deploying:
    """A home without models; MOESTRO_HOME points to it."""
    home = Home(tmp_path / "models")
    monkeypatch.setenv("MOESTRO_HOME", str(home.path))
    prepare_mlflow(home.path)
    return Deploying(home)
