"""A home with a small lifecycle's records in it, and `FixedUpstream`, which speaks the part of vLLM's API needed."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file
from starlette.types import Message, Receive, Scope, Send

from moestro.artifacts import Artifact, Input, LifecycleRun, Record, StepRun, digest_files, fingerprint
from moestro.config import LifecycleConfig, validate
from moestro_flows.home import Home
from moestro_services.gateway.deployments import Deployment
from moestro_services.gateway.listening import listen, serving

NO_TEMPLATE = {"error": {"message": "no chat template", "type": "BadRequestError", "param": None, "code": 400}}


@pytest.fixture(autouse=True)
def commands_keep_their_environment(own_environment: None) -> None:
    """Commands that are called here set this process's environment."""


class FixedUpstream:
    """An ASGI application that answers every completion with fixed bytes; prompts steer it.

    `wait`: never begins to answer; `endless`: streams until the client leaves; `break`: drops the connection midway.
    """

    answer = b'{"id":"cmpl-1","object":"text_completion","choices":[{"index":0,"text":" 19"}]}'
    events = tuple(
        b'data: {"id":"cmpl-1","choices":[{"index":0,"text":"%s"}]}\n\n' % part for part in (b" 1", b"9", b"!")
    )

    def __init__(self) -> None:
        self.url = ""
        self.well = True
        self.seen: list[tuple[str, dict[str, str], bytes]] = []
        self.began = threading.Event()
        self.left = threading.Event()

    def healthy(self) -> bool:
        return self.well

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        body = await _body(receive)
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.seen.append((scope["path"], headers, body))
        asked = json.loads(body)
        if scope["path"] == "/v1/chat/completions":
            await _reply(send, json.dumps(NO_TEMPLATE).encode(), status=400)
        elif asked["prompt"] == "wait":
            self.began.set()
            await self._gone(receive)
        elif asked.get("stream"):
            await self._stream(asked["prompt"], receive, send)
        elif asked["prompt"] == "break":
            await send(_start(200, b"application/json", (b"content-length", b"1000")))
            await send({"type": "http.response.body", "body": b'{"id":', "more_body": True})
        else:
            await _reply(send, self.answer)

    async def _stream(self, prompt: str, receive: Receive, send: Send) -> None:
        await send(_start(200, b"text/event-stream; charset=utf-8"))
        for event in self.events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        if prompt == "endless":
            self.began.set()
            await self._gone(receive)
        elif prompt != "break":
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _gone(self, receive: Receive) -> None:
        async with asyncio.timeout(30):
            while (await receive())["type"] != "http.disconnect":
                pass
        self.left.set()


def _start(status: int, kind: bytes, *more: tuple[bytes, bytes]) -> Message:
    headers = [(b"content-type", kind), (b"x-secret", b"stays here"), *more]
    return {"type": "http.response.start", "status": status, "headers": headers}


async def _body(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


async def _reply(send: Send, body: bytes, *, status: int = 200) -> None:
    await send(_start(status, b"application/json"))
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def upstream() -> Iterator[FixedUpstream]:
    fixed = FixedUpstream()
    with serving(fixed, listen("127.0.0.1", 0)) as url:
        fixed.url = url
        yield fixed


@pytest.fixture
def deployment(upstream: FixedUpstream) -> Deployment:
    return Deployment(
        name="assistant",
        fingerprint="d" * 64,
        checkpoint=Input(stage="compress", fingerprint="c" * 64),
        dtype="float32",
        max_model_len=512,
        created=1_700_000_000,
        server=upstream,
    )


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
        "gate": gate,
    }
    build.add("deploy", {"model": compressed}, result=gate, files={"deployment.json": served})
    build.finish()
    return home


class Deploying:
    """A home with MLflow, in which deployments of made up checkpoints are published."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self._build = HomeBuilder(home)

    def __call__(self, letter: str, **content: Any) -> Artifact:
        """The deployment of a checkpoint of its own; `content` goes into `deployment.json`."""
        checkpoint = self._build.add(f"compress {letter}", {})
        served = {"name": "assistant", "dtype": "float32", "max_model_len": 512} | content
        served["checkpoint"] = {"stage": "compress", "fingerprint": checkpoint.fingerprint}
        files = {"deployment.json": served}
        return self._build.add(f"deploy {letter}", {"model": checkpoint}, result={"load_seconds": 1.5}, files=files)


@pytest.fixture
def deploying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepare_mlflow: Callable[[Path], None]) -> Deploying:
    """A home without models; MOESTRO_HOME points to it."""
    home = Home(tmp_path / "models")
    monkeypatch.setenv("MOESTRO_HOME", str(home.path))
    prepare_mlflow(home.path)
    return Deploying(home)
