"""The gateway before a server that is there already: `python -m moestro_services.gateway_bench.hosted`.

It is the gateway of `moestro serve` in all but the server's start: door with keys and limits, request log, metrics; it
asks no stream again for the sake of its experts, as it would of an idle server. A line of JSON on standard input says
which server; one on standard output where the gateway listens and with what key. It ends when standard input does.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Event

import psutil

from moestro.artifacts import Input
from moestro.errors import ResourceError
from moestro.registry.model_versions import CHAMPION, ModelVersion, RegisteredModel
from moestro_flows.home import Home
from moestro_services.gateway.assembly import Policy
from moestro_services.gateway.caller import Scope
from moestro_services.gateway.deployments import Deployment
from moestro_services.gateway.expert_metrics_sampling import Sampling
from moestro_services.gateway.keys import KeyRing
from moestro_services.gateway.launch import Address, gateway
from moestro_services.gateway.steering import Steering
from moestro_services.gateway_bench.load import Target

NOTHING = "0" * 64


@dataclass(frozen=True)
class Hosted:
    """A gateway in a process of its own."""

    target: Target
    process: psutil.Process

    def memory(self) -> int:
        """Bytes that it holds."""
        return int(self.process.memory_info().rss)


@contextmanager
def hosted(server: Target, model: str) -> Iterator[Hosted]:
    """The gateway before `server` while in the block; raises `ResourceError` if it does not start."""
    command = [sys.executable, "-m", "moestro_services.gateway_bench.hosted"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps({"url": server.url, "key": server.key, "model": model}) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise ResourceError("The gateway did not start.")
        yield Hosted(Target(**json.loads(line)), psutil.Process(process.pid))
    finally:
        process.stdin.close()
        process.wait()


class Standing:
    """A server that somebody else has started, and ends."""

    def __init__(self, url: str, key: str) -> None:
        self.url = url
        self.api_key = key
        self.port = int(url.rpartition(":")[2])
        self._ended = Event()

    def start(self, timeout: float = 0.0) -> None:
        """It answers already."""

    def healthy(self) -> bool:
        """Always."""
        return True

    def wait(self, timeout: float | None = None) -> bool:
        """Until `stop`."""
        return self._ended.wait(timeout)

    def stop(self) -> None:
        """End `wait`."""
        self._ended.set()


class Given:
    """One standing server as a source of models."""

    def __init__(self, home: Home, name: str, server: Standing) -> None:
        self.steering = Steering(home.store)
        self._server = server
        version = ModelVersion(name, "1", "deploy", NOTHING, datetime.now(UTC), {})
        self._model = RegisteredModel(name, (version,), {CHAMPION: "1"}, 0.0)

    def read(self) -> Sequence[RegisteredModel]:
        """Always the one."""
        return [self._model]

    def open(self, version: ModelVersion) -> tuple[Deployment, Standing]:
        """The server."""
        checkpoint = Input(stage="compress", fingerprint=NOTHING)
        deployment = Deployment(version.name, version.version, NOTHING, checkpoint, "float32", 512, 0)
        return deployment, self._server


def main() -> None:
    """Entry point."""
    asked = json.loads(sys.stdin.readline())
    with tempfile.TemporaryDirectory() as folder:
        home = Home(Path(folder))
        home.prepare()
        keys = KeyRing.of(home)
        _, secret = keys.create("load", {Scope.INFER})
        policy = Policy(keys=keys, sampling=Sampling(share=0))
        source = Given(home, asked["model"], Standing(asked["url"], asked["key"]))
        with gateway(home, source, Address(), say=lambda _: None, policy=policy) as running:
            running.wait_until_ready()
            sys.stdout.write(json.dumps({"url": running.url, "key": secret}) + "\n")
            sys.stdout.flush()
            sys.stdin.read()


if __name__ == "__main__":
    main()
