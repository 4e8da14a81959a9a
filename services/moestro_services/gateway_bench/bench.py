"""`moestro bench gateway`: throughput, latency and memory under 64 streams, and what faults under load cost users."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moestro.artifacts import Artifact
from moestro.config import LifecycleConfig, load_lifecycle
from moestro.errors import ArtifactError
from moestro.inference.server import ServerConfig, VllmServer
from moestro_flows.home import Home
from moestro_services.catalog import Catalog
from moestro_services.gateway.listening import address, listen
from moestro_services.gateway_bench import cost, faults
from moestro_services.gateway_bench.hosted import hosted
from moestro_services.gateway_bench.load import Load, Target
from moestro_services.gateway_bench.standin import FIRST_TOKEN_SECONDS, TOKEN_SECONDS
from moestro_services.served import Served, describe

CONFIG = Path("examples/quickstart.yaml")
STREAMS = 64
ROUNDS = 4
ROUND_SECONDS = 15.0
MINUTE = 60.0
MODEL_TOKENS, STANDIN_TOKENS = 32, 40
STANDIN_SECONDS = FIRST_TOKEN_SECONDS + (STANDIN_TOKENS - 1) * TOKEN_SECONDS
"""Of one of its answers."""
KV_CACHE_GIB = 1.0


def bench() -> dict[str, Any]:
    """Some ten minutes, on two cores that should be idle, after `make demo`."""
    home, config = Home.current(), load_lifecycle(CONFIG)
    deployment = Catalog(home).entry("deploy").artifact
    served = describe(deployment)
    compressed = _found(home, served.checkpoint.stage, served.checkpoint.fingerprint)
    whole = compressed.record.inputs["model"]
    with tempfile.TemporaryDirectory() as name:
        throughput = model_cost(compressed, served, Path(name))
        latency = standin_cost()
        versions = [compressed, _found(home, whole.stage, whole.fingerprint)]
        found = faults.measure(Path(name) / "home", home, config, versions, MINUTE)
    return report(config, throughput, latency, found)


def model_cost(model: Artifact, served: Served, folder: Path) -> cost.Cost:
    """The quickstart's model under load, directly and through the gateway."""
    settings = ServerConfig(
        name=served.name, dtype=served.dtype, max_model_len=served.max_model_len, kv_cache_gib=KV_CACHE_GIB
    )
    with VllmServer(model.path, settings, log=folder / "vllm.log") as server:
        server.start()
        direct = Target(server.url, server.api_key)
        load = Load((direct,), served.name, STREAMS, ROUND_SECONDS, MODEL_TOKENS)
        with hosted(direct, served.name) as ours:
            return cost.measure(load, direct, ours.target, ROUNDS, ours.memory)


def standin_cost() -> cost.Cost:
    """A server of fixed speed under load, directly and through the gateway."""
    with standin() as direct, hosted(direct, "fixed") as ours:
        load = Load((direct,), "fixed", STREAMS, ROUND_SECONDS, STANDIN_TOKENS, spread=STANDIN_SECONDS)
        return cost.measure(load, direct, ours.target, ROUNDS, ours.memory)


@contextmanager
def standin() -> Iterator[Target]:
    """A stand-in for vLLM in a process of its own while in the block."""
    made = listen("127.0.0.1", 0)
    descriptor = made.fileno()
    command = [sys.executable, "-m", "moestro_services.gateway_bench.standin", str(descriptor)]
    process = subprocess.Popen(command, pass_fds=[descriptor])
    try:
        yield Target(address(made))
    finally:
        made.close()
        process.terminate()
        process.wait()


def report(config: LifecycleConfig, throughput: cost.Cost, latency: cost.Cost, found: faults.Faults) -> dict[str, Any]:
    """The table, its bounds and notes."""
    assert config.deploy is not None
    shared = cost.throughput(throughput)
    model, fixed = "the quickstart's model", "a stand-in of fixed speed"
    columns = ["server", "asked", "requests", "failed", "tokens/s", "first token, ms: median", "p99"]
    return {
        "title": f"The gateway under {STREAMS} concurrent streams",
        "columns": columns,
        "rows": [*cost.rows(model, throughput), *cost.rows(fixed, latency)],
        "bounds": [
            cost.throughput_bound(latency),
            *cost.latency_bounds(latency),
            cost.failures_bound(model, throughput),
            cost.failures_bound(fixed, latency),
            cost.memory_bound(latency),
            *faults.bounds(found, config.deploy.name),
        ],
        "notes": [
            f"Each server: {ROUNDS} rounds of {ROUND_SECONDS:g} s each way, in turn; answers of {MODEL_TOKENS} tokens "
            f"by the model, of {STANDIN_TOKENS} by the stand-in, one each {TOKEN_SECONDS * 1e3:g} ms whatever happens. "
            "Its streams begin one after the other.",
            "Client, gateway and vLLM share this machine's cores, so with the model they take them from each other: "
            f"through the gateway it is {shared.median:.3f} [{shared.low:.3f}, {shared.high:.3f}] as fast. Bounds on "
            "throughput, latency and memory are read off the stand-in, whose speed is its own.",
            *faults.told(found),
        ],
    }


def _found(home: Home, stage: str, fingerprint: str) -> Artifact:
    artifact = home.store.find(stage, fingerprint)
    if artifact is None:
        raise ArtifactError(f"{stage} {fingerprint[:16]} is not in {home.path}.", hint="`make demo` makes it again.")
    return artifact
