"""Real vLLM processes behind the gateway, killed, promoted and rolled back while clients ask without a pause."""

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from moestro.registry.model_versions import ModelVersion, RegisteredModel
from moestro_flows.home import Home
from moestro_services.gateway.launch import Address, Running, gateway
from moestro_services.gateway.sources import Registered, ServerSettings

ASK: dict[str, Any] = {"prompt": "Question: What is", "max_tokens": 16, "temperature": 0}
CLIENTS = 2
PAUSE = 0.1
WAIT = 300


class Clients:
    """Ask and ask again, half of them for streams, and keep what they got by status and version."""

    def __init__(self, url: str, model: str) -> None:
        self.url = url
        self.model = model
        self.seen: Counter[tuple[int, str]] = Counter()
        self.odd: list[str] = []
        self._changed = threading.Condition()
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(CLIENTS)]

    def __enter__(self) -> "Clients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(WAIT)

    def until(self, status: int, version: str, more: int = 10) -> None:
        """Wait for so many more answers of that kind."""
        self._wait(status, version, self.seen[status, version] + more)

    def until_refused(self) -> None:
        """Wait for the first 503, unless there was one."""
        self._wait(503, "", 1)

    def _wait(self, status: int, version: str, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.seen[status, version] >= count or self.odd, WAIT)

    def _ask(self, number: int) -> None:
        stream = bool(number % 2)
        with httpx.Client(timeout=WAIT) as client:
            while not self._over.wait(PAUSE):
                try:
                    response = client.post(
                        self.url + "/v1/completions", json=ASK | {"model": self.model, "stream": stream}
                    )
                    self._note(response)
                except httpx.RemoteProtocolError:  # an answer that had begun: it cannot be told otherwise
                    self._count(0, "")

    def _note(self, response: httpx.Response) -> None:
        text = response.text
        if response.status_code != 200:
            if "Retry-After" not in response.headers or response.json()["error"]["code"] != "model_unavailable":
                self.odd.append(text)
            self._count(response.status_code, "")
            return
        if '"error":' in text:  # a stream that had begun
            self._count(0, "")
            return
        found = {name for name in ("tiny@1", "tiny@2") if f'"system_fingerprint":"{name}"' in text}
        if len(found) != 1 or not ("[DONE]" in text or '"usage":{' in text):
            self.odd.append(text)
        self._count(200, found.pop() if found else "")

    def _count(self, status: int, version: str) -> None:
        with self._changed:
            self.seen[status, version] += 1
            self._changed.notify_all()


def processes(*words: str) -> list[psutil.Process]:
    """The children of this process, but for supervisors, whose name and command line have all of `words`."""
    found = []
    for child in psutil.Process().children(recursive=True):
        line = " ".join([child.name(), *child.cmdline()])
        if "supervisor" not in line and all(word in line for word in words):
            found.append(child)
    return found


def ports(running: Running) -> dict[str, int]:
    return {state.version: state.port for state in running.fleet.replicas()}


@pytest.mark.slow
def test_killed_promoted_and_rolled_back_under_load(tmp_path: Path, deploy_tiny: Any) -> None:
    home = Home(tmp_path / "home")
    artifacts = [deploy_tiny(home.path, seed=seed) for seed in (1, 2)]
    versions = tuple(
        ModelVersion("tiny", str(number), "deploy", artifact.fingerprint, artifact.record.created_at, {})
        for number, artifact in enumerate(artifacts, 1)
    )
    aliases: dict[str, str] = {"champion": "1", "challenger": "2"}
    home.logs.mkdir(parents=True, exist_ok=True)

    def registry() -> list[RegisteredModel]:
        return [RegisteredModel("tiny", versions, dict(aliases), 0.0)]

    source = Registered(home, registry, settings=ServerSettings(kv_cache_gib=0.05, threads=1))
    said: list[str] = []
    with gateway(home, source, Address(), say=said.append) as running:
        running.wait_for_first_starts()
        assert running.fleet.wait_for(lambda fleet: all(state.port for state in fleet.replicas()), WAIT)
        with Clients(running.url, "tiny") as champion, Clients(running.url, "tiny@2") as challenger:
            champion.until(200, "tiny@1")
            challenger.until(200, "tiny@2")
            (server,) = processes(f"--port {ports(running)['1']} ", "api_server")
            (other,) = processes(f"--port {ports(running)['2']} ", "api_server")
            (engine,) = set(processes("EngineCore")) & set(other.children())
            server.kill()
            engine.kill()
            champion.until_refused()
            challenger.until_refused()
            champion.until(200, "tiny@1")
            challenger.until(200, "tiny@2")
        assert champion.odd == challenger.odd == []
        assert {version for _, version in champion.seen} <= {"tiny@1", ""}
        assert {version for _, version in challenger.seen} <= {"tiny@2", ""}
        assert [state.restarts for state in running.fleet.replicas()] == [1, 1]

        with Clients(running.url, "tiny") as clients:
            clients.until(200, "tiny@1")
            aliases |= {"champion": "2", "previous": "1"}
            del aliases["challenger"]
            running.fleet.kick()
            clients.until(200, "tiny@2")
            aliases |= {"champion": "1", "previous": "2"}
            running.fleet.kick()
            clients.until(200, "tiny@1")
            aliases |= {"champion": "2"}
            del aliases["previous"]
            running.fleet.kick()
            clients.until(200, "tiny@2")
            assert running.fleet.wait_for(lambda fleet: len(fleet.replicas()) == 1, WAIT)
        assert clients.odd == []
        assert set(clients.seen) == {(200, "tiny@1"), (200, "tiny@2")}
    assert processes("api_server") == []
    assert "tiny is now answered by tiny@2 (before: tiny@1)." in said
