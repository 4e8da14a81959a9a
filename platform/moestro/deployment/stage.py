"""The deploy stage: serve the checkpoint with vLLM, measure it at every gate, let it pass or not."""

import json
import time
from collections.abc import Mapping
from typing import Any

import torch

from moestro.artifacts import Artifact, Job
from moestro.config import DeployConfig
from moestro.deployment.gates import GATES, Gate, Subject, Verdict
from moestro.errors import GateError, InputError
from moestro.inference.client import Endpoint
from moestro.inference.footprint import machine
from moestro.inference.routes import returned_routing
from moestro.inference.server import ServerConfig, VllmServer
from moestro.models.checkpoint import load_model
from moestro.models.files import check_folder

DEPLOYMENT = "deployment.json"


def deploy(config: DeployConfig, *, model: Artifact, tokens: Mapping[str, Artifact], job: Job) -> dict[str, Any]:
    """Measure `model` at every gate on held-out windows of every domain and write deployment.json.

    All gates are measured while one server runs, and then with transformers. Result: their figures by name, `passed`
    by gate, `machine`, `load_seconds`, and where `config.force` overrules them `refused`.
    Raises `GateError` with every refusal's figure and threshold, `InputError` if the windows or the model do not fit
    the config, `ResourceError` if the server does not start.
    """
    _check(config, model, tokens)
    subject = Subject(config, model, tokens, returned_routing(model.path, config.max_model_len))
    gates = {name: kind(subject) for name, kind in GATES.items()}
    job.reporter.progress(0, 2, "starting vLLM")
    load_seconds = _ask(gates, subject, job)
    job.reporter.progress(1, 2, "comparing with transformers")
    network = load_model(model.path, dtype=getattr(torch, config.dtype), experts="eager", tokenizer=True)
    verdicts = {name: gate.judge(network) for name, gate in gates.items()}
    result = _result(verdicts)
    job.reporter.metrics({name: value for name, value in result.items() if isinstance(value, int | float)}, 0)
    refused = [f"{name}: {words}" for name, verdict in verdicts.items() for words in verdict.refused]
    if refused and not config.force:
        raise _refusal(config, verdicts, refused)
    (job.out / DEPLOYMENT).write_text(json.dumps(_deployment(subject, gates, verdicts), indent=2) + "\n")
    job.reporter.progress(2, 2, f"forced past {len(refused)} refusals" if refused else "passed all gates")
    passed = {name: not verdict.refused for name, verdict in verdicts.items()}
    overruled = {"refused": refused} if refused else {}
    return result | overruled | {"passed": passed, "machine": machine(job.resources.cpus), "load_seconds": load_seconds}


def _check(config: DeployConfig, model: Artifact, tokens: Mapping[str, Artifact]) -> None:
    positions = check_folder(model.path, tokenizer=True).get("max_position_embeddings")
    if positions is not None and config.max_model_len > positions:
        raise InputError(
            f"deploy.max_model_len is {config.max_model_len}, the model has {positions} positions.",
            hint=f"Set deploy.max_model_len to {positions} or less.",
        )
    if not tokens:
        raise InputError("There are no tokens to hold the server against.", hint="Hand in at least one domain.")


def _ask(gates: Mapping[str, Gate], subject: Subject, job: Job) -> float:
    """Let every gate ask a real server over REST; the seconds it took to start."""
    config = subject.config
    settings = ServerConfig(
        name=config.name,
        dtype=config.dtype,
        max_model_len=config.max_model_len,
        threads=job.resources.cpus,
        tool_call_parser=config.tool_call_parser,
    )
    started = time.monotonic()
    with VllmServer(subject.model.path, settings, log=job.scratch / "vllm.log") as server:
        server.start()
        load_seconds = time.monotonic() - started
        for name, gate in gates.items():
            job.reporter.progress(0, 2, f"asking vLLM: {name}")
            gate.ask(Endpoint(server.url, config.name, server.api_key), server.port)
    return load_seconds


def _result(verdicts: Mapping[str, Verdict]) -> dict[str, Any]:
    """Every figure of every gate by its name; no two gates have one of the same name."""
    return {
        name: value for verdict in verdicts.values() for name, value in {**verdict.figures, **verdict.times}.items()
    }


def _refusal(config: DeployConfig, verdicts: Mapping[str, Verdict], refused: list[str]) -> GateError:
    number = sum(bool(verdict.refused) for verdict in verdicts.values())
    gates = "A gate refuses" if number == 1 else f"{number} gates refuse"
    doubt = " In bfloat16 allow more (deploy.parity); in float32 this is a fault." if verdicts["parity"].refused else ""
    return GateError(
        f"{gates} {config.name}. {'; '.join(refused)}.",
        hint=f"Nothing was deployed.{doubt} A reason in deploy.force (or --force) overrules them and is recorded.",
    )


def _deployment(subject: Subject, gates: Mapping[str, Gate], verdicts: Mapping[str, Verdict]) -> dict[str, Any]:
    config = subject.config
    return {
        "name": config.name,
        "checkpoint": {"stage": subject.model.stage, "fingerprint": subject.model.fingerprint},
        "dtype": config.dtype,
        "max_model_len": config.max_model_len,
        "tool_call_parser": config.tool_call_parser,
        "gates": {name: _entry(gates[name], verdict) for name, verdict in verdicts.items()},
        "forced": config.force,
    }


def _entry(gate: Gate, verdict: Verdict) -> dict[str, Any]:
    """A gate in deployment.json; the verdict of a timed one depends on the moment and stands in the record alone."""
    return {
        "figures": dict(verdict.figures),
        "thresholds": verdict.thresholds.model_dump(mode="json"),
        "evidence": dict(verdict.evidence),
        "passed": None if gate.timed else not verdict.refused,
        "note": verdict.note,
    }
