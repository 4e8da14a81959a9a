"""The supervised vLLM server and the deploy stage: start, score over REST, refuse, end with its parent."""

import importlib.metadata
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from moestro.artifacts import Artifact, Job
from moestro.config import DeployConfig, MemoryGate, ParityGate, QualityGate, RoutingGate, TaskConfig
from moestro.data.tokenizer import train_bpe
from moestro.deployment import deploy
from moestro.deployment.comparison import refusals
from moestro.errors import BusyError, GateError, InputError, ResourceError
from moestro.inference.server import ServerConfig, VllmServer
from moestro.models.checkpoint import load_model

CONFIG = DeployConfig(
    name="tiny",
    max_model_len=128,
    parity=ParityGate(sequences=3, sequence_length=32),
    quality=QualityGate(
        task=TaskConfig(name="chain_sum", arguments={"max_terms": 2, "max_digits": 1}), problems=8, max_answer_tokens=4
    ),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=288,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        initializer_range=0.12,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    train_bpe(["Question: What is 1 + 2?\nAnswer: 3\n"] * 3, 288).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("tokens")
    ids = np.random.default_rng(0).integers(1, 280, 150).astype(np.uint16)
    np.save(folder / "held_out.npy", ids)
    np.save(folder / "held_out_documents.npy", np.zeros(1, np.int64))
    return {"math": Artifact(folder, "tokens", "1" * 64)}


def descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """The test leaves no process behind."""
    before = descendants()
    yield
    assert [process for process in descendants() if process not in before] == []


def job(base: Path) -> Job:
    (base / "out").mkdir()
    (base / "scratch").mkdir()
    return Job(out=base / "out", scratch=base / "scratch")


def test_a_port_in_use_is_named(checkpoint, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(BusyError, match=str(port)):
            VllmServer(checkpoint, ServerConfig(name="x", port=port), log=tmp_path / "log").start()


def test_a_model_with_fewer_positions_than_are_to_be_served_is_refused(checkpoint, tokens, tmp_path):
    with pytest.raises(InputError, match=r"max_model_len is 512, the model has 128 positions"):
        deploy(DeployConfig(), model=Artifact(checkpoint, "rl", "0" * 64), tokens=tokens, job=job(tmp_path))


def test_too_little_held_out_text_is_refused(checkpoint, tokens, tmp_path):
    config = CONFIG.model_copy(update={"parity": ParityGate(sequences=5, sequence_length=32)})
    with pytest.raises(InputError, match="Domain math has 4 held-out windows of 32 tokens"):
        deploy(config, model=Artifact(checkpoint, "rl", "0" * 64), tokens=tokens, job=job(tmp_path))


@pytest.mark.parametrize(
    ("quality", "message"),
    [
        ({"max_held_out_loss": {"maths": 2.0}}, "bounds 'maths', which is no domain. Domains are math"),
        ({"task": TaskConfig(name="chain_sum"), "max_answer_tokens": 100}, "need .* positions, 128 are served"),
    ],
)
def test_what_the_quality_gate_cannot_measure_is_refused_before_anything_starts(
    checkpoint, tokens, tmp_path, quality, message
):
    config = CONFIG.model_copy(update={"quality": QualityGate(**quality)})
    with pytest.raises(InputError, match=message):
        deploy(config, model=Artifact(checkpoint, "rl", "0" * 64), tokens=tokens, job=job(tmp_path))


@pytest.mark.slow
def test_a_server_that_cannot_start_shows_the_end_of_its_log(checkpoint, tmp_path, nothing_left):
    server = VllmServer(checkpoint, ServerConfig(name="x", max_model_len=100_000), log=tmp_path / "log")
    with pytest.raises(ResourceError, match="max_position_embeddings"):
        server.start()


@pytest.mark.slow
def test_the_gate_passes_an_honest_checkpoint(checkpoint, tokens, tmp_path, nothing_left):
    model = Artifact(checkpoint, "rl", "0" * 64)
    config = CONFIG.model_copy(update={"tool_call_parser": "hermes"})
    result = deploy(config, model=model, tokens=tokens, job=job(tmp_path))
    deployment = json.loads((tmp_path / "out" / "deployment.json").read_text())
    assert deployment["checkpoint"] == {"stage": "rl", "fingerprint": "0" * 64}
    assert deployment["tool_call_parser"] == "hermes"
    gates = deployment["gates"]
    assert gates["parity"]["figures"]["tokens"] == 3 * 31
    assert gates["parity"]["figures"]["max_logprob_difference"] <= 1e-4
    assert gates["parity"]["figures"]["routing_agreement"] == 1.0
    assert gates["parity"]["thresholds"]["max_logprob_difference"] == 1e-3
    assert {name: gate["note"] for name, gate in gates.items()} == dict.fromkeys(gates, "")
    assert {name: gate["passed"] for name, gate in gates.items()} == {
        **dict.fromkeys(("parity", "quality", "routing"), True),
        **dict.fromkeys(("latency", "memory"), None),
    }
    assert gates["quality"]["figures"]["held_out_loss"]["math"] == pytest.approx(np.log(288), abs=1.5)
    assert gates["quality"]["evidence"]["task"]["name"] == "chain_sum"
    assert len(gates["quality"]["evidence"]["task"]["right"]) == 8
    assert gates["routing"]["figures"]["routed_tokens"] == 4 * 32
    assert gates["routing"]["figures"]["experts"] == 2 * 4
    assert gates["memory"]["figures"] == {"weights_bytes": (checkpoint / "model.safetensors").stat().st_size}
    assert deployment["forced"] == ""
    assert result["load_seconds"] > 0
    assert 0 < result["per_token_seconds"] < result["first_token_seconds"] < 60
    assert result["peak_memory_bytes"] > 100e6  # a server without any model holds more
    assert result["passed"] == dict.fromkeys(gates, True)
    assert "refused" not in result
    times = (str(result[name]) for name in ("load_seconds", "first_token_seconds", "peak_memory_bytes"))
    assert not any(figure in json.dumps(deployment) for figure in times)
    assert refusals(deployment, deployment, result=result, champion_result=result) == []


IMPOSSIBLE = {
    "quality": CONFIG.quality.model_copy(update={"max_held_out_loss": {"math": 0.5}, "min_accuracy": 1.0}),
    "routing": RoutingGate(max_load_variation=1e-6),
    "latency": CONFIG.latency.model_copy(update={"max_first_token_seconds": 1e-9}),
    "memory": MemoryGate(max_peak_gib=1e-3),
}
"""Bounds that cannot be met."""


@pytest.mark.slow
def test_gates_are_overruled_by_a_reason_and_where_vllm_returns_no_routing_the_record_says_so(
    checkpoint, tokens, tmp_path, nothing_left
):
    sliding = tmp_path / "sliding"
    shutil.copytree(checkpoint, sliding)
    config = json.loads((sliding / "config.json").read_text())
    (sliding / "config.json").write_text(json.dumps(config | {"sliding_window": 16}))
    forced = CONFIG.model_copy(update=IMPOSSIBLE | {"force": "a rehearsal"})
    result = deploy(forced, model=Artifact(sliding, "rl", "0" * 64), tokens=tokens, job=job(tmp_path))
    deployment = json.loads((tmp_path / "out" / "deployment.json").read_text())
    assert deployment["forced"] == "a rehearsal"
    gates = deployment["gates"]
    assert [gates[name]["passed"] for name in ("quality", "latency", "memory")] == [False, None, None]
    assert [result["passed"][name] for name in ("quality", "latency", "memory")] == [False] * 3
    assert len(result["refused"]) == 4
    assert gates["parity"]["note"].startswith("routing was not compared: vLLM returns none")
    assert gates["parity"]["figures"]["routing_agreement"] is None
    assert gates["parity"]["figures"]["max_logprob_difference"] <= 1e-4
    assert gates["routing"]["note"].startswith("not measured: ")
    assert gates["routing"]["figures"] == {}


@pytest.mark.slow
def test_gates_refuse_together(checkpoint, tokens, tmp_path, monkeypatch, nothing_left):
    """Other weights are served than transformers reads, and every other gate has a bound that cannot be met."""

    def perturbed(*args, **kwargs):
        model = load_model(*args, **kwargs)
        with torch.no_grad():
            model.model.layers[1].mlp.experts.down_proj[2] *= 1.5
        return model

    monkeypatch.setattr("moestro.deployment.stage.load_model", perturbed)
    config, model = CONFIG.model_copy(update=IMPOSSIBLE), Artifact(checkpoint, "rl", "0" * 64)
    expected = (
        r"5 gates refuse tiny\. parity: .*differ by up to .* nats .*at most 0\.001 is allowed",
        r"quality: the held-out loss of math is .*at most 0\.5 .*; quality: task accuracy is .*at least 1 ",
        r"routing: .*load variation is .*; latency: .*first token is .*; memory: the peak .* GiB",
    )
    attempt = job(tmp_path)
    with pytest.raises(GateError, match=r".*".join(expected)) as refused:
        deploy(config, model=model, tokens=tokens, job=attempt)
    assert "Nothing was deployed" in refused.value.hint
    assert not list(attempt.out.iterdir())


@pytest.mark.parametrize(("parser", "flags"), [("", []), ("hermes", ["--tool-call-parser", "hermes"])])
def test_tool_calls_are_parsed_where_the_deployment_names_a_parser(checkpoint, tmp_path, parser, flags):
    command = VllmServer(checkpoint, ServerConfig(name="x", tool_call_parser=parser), log=tmp_path / "log")._command()
    assert [word for word in command if "tool-call-parser" in word or word == "hermes"] == flags
    assert ("--enable-auto-tool-choice" in command) is bool(parser)


@pytest.mark.parametrize(("version", "on_cpu"), [("0.30.0+cpu", True), ("0.30.0", False), ("", True)])
def test_on_a_cpu_prompts_are_not_prefilled_in_chunks(checkpoint, tmp_path, monkeypatch, version, on_cpu):
    def installed(name):
        if not version:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    server = VllmServer(checkpoint, ServerConfig(name="x", extra_arguments=("--last", "1")), log=tmp_path / "log")
    assert ("--no-enable-chunked-prefill" in server._command()) is on_cpu
    assert server._command()[-2:] == ["--last", "1"]


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    """One that runs."""
    log = tmp_path_factory.mktemp("server") / "log"
    with VllmServer(checkpoint, ServerConfig(name="x", max_model_len=128), log=log) as running:
        running.start()
        yield running


@pytest.mark.slow
def test_seeds_do_not_end_the_engine(server):
    """More prompts at once than one step takes: some would be prefilled in two."""
    prompts = [[prompt + 1, *range(2, 120)] for prompt in range(48)]
    ask = {"model": "x", "prompt": prompts, "max_tokens": 2, "seed": 7, "temperature": 1.0}
    headers = {"Authorization": f"Bearer {server.api_key}"}
    first, again = (
        httpx.post(f"{server.url}/v1/completions", json=ask, headers=headers, timeout=120).json() for _ in range(2)
    )
    assert len(first["choices"]) == len(prompts)
    assert [choice["text"] for choice in first["choices"]] == [choice["text"] for choice in again["choices"]]
    assert server.healthy()


@pytest.mark.slow
def test_nothing_but_its_health_is_told_without_the_servers_key(server):
    with httpx.Client(base_url=server.url, timeout=120) as asking:
        own = {"Authorization": f"Bearer {server.api_key}"}
        paths = asking.get("/openapi.json", headers=own).json()["paths"]
        assert {"/invocations", "/tokenize", "/version", "/v1/completions"} <= paths.keys()
        found = {
            (path, method): asking.request(method, path, headers={"Authorization": "Bearer another"}).status_code
            for path in [*paths, "/metrics", "/openapi.json", "/docs", "//health", "/health/"]
            for method in ("GET", "POST")
            if path != "/health"
        }
        assert set(found.values()) == {401}, found
        assert asking.post("/invocations", json={}).status_code == 401
        asked = {"model": "x", "prompt": [1, 2], "max_tokens": 1}
        assert asking.post("/invocations", json=asked, headers=own).status_code == 200


@pytest.mark.slow
def test_the_server_and_its_engine_die_with_a_killed_parent(checkpoint, tmp_path):
    code = (
        "import pathlib, sys\n"
        "from moestro.inference.server import ServerConfig, VllmServer\n"
        f"server = VllmServer(pathlib.Path({str(checkpoint)!r}), ServerConfig(name='x', max_model_len=64),"
        f" log=pathlib.Path({str(tmp_path / 'log')!r}))\n"
        "server.start(); print(server.url, flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline().startswith("http://127.0.0.1:")
        orphans = psutil.Process(parent.pid).children(recursive=True)
        assert len(orphans) >= 3  # supervisor, server, engine
        os.kill(parent.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(orphans, timeout=60)
    assert not alive


@pytest.mark.slow
def test_the_server_and_its_engine_die_with_a_killed_supervisor(checkpoint, tmp_path):
    before = descendants()
    with VllmServer(checkpoint, ServerConfig(name="x", max_model_len=64), log=tmp_path / "log") as server:
        server.start()
        assert server.healthy()
        started = [process for process in descendants() if process not in before]
        (supervisor,) = (process for process in started if process.ppid() == os.getpid())
        supervisor.kill()
        _, alive = psutil.wait_procs(started, timeout=60)
        assert not alive
        assert not server.healthy()
