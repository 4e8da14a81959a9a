"""The deploy stage: serve the checkpoint with vLLM, hold its answers against transformers', let it pass or not."""

import json
import time
from collections.abc import Mapping

import torch

from moestro.artifacts import Artifact, Job
from moestro.config import DeployConfig
from moestro.data.packed import PackedTokens
from moestro.deployment.parity import compare, reference, require_parity
from moestro.errors import InputError
from moestro.inference.client import score_over_http
from moestro.inference.engine import Scored
from moestro.inference.routes import RoutingShape, returned_routing, routing_shape
from moestro.inference.server import ServerConfig, VllmServer
from moestro.models.checkpoint import load_model
from moestro.models.files import check_folder

DEPLOYMENT = "deployment.json"


def deploy(
    config: DeployConfig, *, model: Artifact, tokens: Mapping[str, Artifact], job: Job
) -> dict[str, float | None]:
    """Gate `model` on held-out windows of every domain and write deployment.json.

    Raises `GateError` with the figures if the served model differs from its checkpoint, `InputError` if the windows or
    the model do not fit the config, `ResourceError` if the server does not start.
    """
    _check(config, model)
    sequences = _windows(config, tokens)
    job.reporter.progress(0, 2, "starting vLLM")
    shape = returned_routing(model.path, config.max_model_len)
    served, load_seconds = _served(config, model, sequences, shape, job)
    job.reporter.progress(1, 2, "comparing with transformers")
    honest = load_model(model.path, dtype=getattr(torch, config.dtype), experts="eager", tokenizer=True)
    parity = compare(served, reference(honest, sequences, routes=shape is not None))
    figures = parity.figures()
    job.reporter.metrics({name: value for name, value in figures.items() if value is not None}, 0)
    require_parity(parity, config.parity)
    deployment = {
        "name": config.name,
        "checkpoint": {"stage": model.stage, "fingerprint": model.fingerprint},
        "dtype": config.dtype,
        "max_model_len": config.max_model_len,
        "gate": {
            "figures": figures,
            "thresholds": config.parity.model_dump(mode="json"),
            "routing": _routing_note(model, shape),
        },
    }
    (job.out / DEPLOYMENT).write_text(json.dumps(deployment, indent=2) + "\n")
    job.reporter.progress(2, 2, f"within {figures['max_logprob_difference']} nats of transformers")
    return figures | {"load_seconds": load_seconds}


def _check(config: DeployConfig, model: Artifact) -> None:
    positions = check_folder(model.path, tokenizer=True).get("max_position_embeddings")
    if positions is not None and config.max_model_len > positions:
        raise InputError(
            f"deploy.max_model_len is {config.max_model_len}, the model has {positions} positions.",
            hint=f"Set deploy.max_model_len to {positions} or less.",
        )


def _windows(config: DeployConfig, tokens: Mapping[str, Artifact]) -> list[list[int]]:
    """The first held-out windows of every domain, as many as the gate asks for."""
    if not tokens:
        raise InputError("There are no tokens to hold the server against.", hint="Hand in at least one domain.")
    gate = config.parity
    windows: list[list[int]] = []
    for domain, artifact in tokens.items():
        found = PackedTokens.open(artifact.path, "held_out").windows(gate.sequence_length)
        if len(found) < gate.sequences:
            raise InputError(
                f"Domain {domain} has {len(found)} held-out windows of {gate.sequence_length} tokens, "
                f"the gate wants {gate.sequences}.",
                hint="Lower deploy.parity.sequences or deploy.parity.sequence_length, or hold out more text.",
            )
        windows += found[: gate.sequences].tolist()
    return windows


def _routing_note(model: Artifact, shape: RoutingShape | None) -> str:
    if shape:
        return "compared"
    if routing_shape(model.path) is None:
        return "none: the model is dense"
    return "not compared: vLLM returns none for a model whose layers all slide; log-probabilities alone were compared"


def _served(
    config: DeployConfig, model: Artifact, sequences: list[list[int]], shape: RoutingShape | None, job: Job
) -> tuple[list[Scored], float]:
    """`sequences` scored by a real server over REST, and the seconds it took to start."""
    settings = ServerConfig(
        name=config.name, dtype=config.dtype, max_model_len=config.max_model_len, threads=job.resources.cpus
    )
    started = time.monotonic()
    with VllmServer(model.path, settings, log=job.scratch / "vllm.log") as server:
        server.start()
        load_seconds = time.monotonic() - started
        scored = score_over_http(server.url, config.name, sequences, shape=shape, api_key=server.api_key)
    return scored, load_seconds
