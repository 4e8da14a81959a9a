"""What users notice when a model's process is killed, and when a version is promoted and rolled back, under load.

In a home of its own with two versions of the quickstart's model, behind `moestro serve` as users start it.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import psutil

from moestro.artifacts import Artifact
from moestro.config import LifecycleConfig, Resources
from moestro.errors import ResourceError
from moestro.execution import Step, run_step
from moestro_flows.home import Home
from moestro_services.audit import Audit
from moestro_services.gateway.caller import Scope
from moestro_services.gateway.keys import KeyRing
from moestro_services.gateway_bench.load import Load, Result, Running, Target
from moestro_services.promotion import Promotions

ACTOR = "bench"
START_SECONDS = 300
STOP_SECONDS = 60


@dataclass(frozen=True)
class Faults:
    """What the load saw of each."""

    killed: Result
    switched: Result


def measure(folder: Path, source: Home, config: LifecycleConfig, checkpoints: list[Artifact], seconds: float) -> Faults:
    """Serve both `checkpoints` of the home `source` from `folder`, and disturb that for twice `seconds`."""
    assert config.deploy is not None
    home, name = Home(folder), config.deploy.name
    home.prepare()
    two_versions(home, source, config, checkpoints)
    _, key = KeyRing.of(home).create("bench", {Scope.ADMIN})
    with served(home, key) as (url, process):
        load = Load((Target(url, key),), name, seconds=seconds)
        killed = _killed(load, process, f"{name}@1")
        _wait_for_both(url, key)
        switched = _switched(load, url, key)
    return Faults(killed, switched)


def two_versions(home: Home, source: Home, config: LifecycleConfig, checkpoints: list[Artifact]) -> None:
    """Deploy copies of both through their gates: the first becomes the champion, the second the challenger."""
    promotions = Promotions(home, Audit.of(home))
    tokens = {name: source.store.find("tokens", fingerprint) for name, fingerprint in _tokens(source).items()}
    for artifact in (*checkpoints, *tokens.values()):
        assert artifact is not None
        shutil.copytree(artifact.path, home.store.folder(artifact.stage, artifact.fingerprint), dirs_exist_ok=True)
    for model in checkpoints:
        step = Step("deploy", config.deploy, {"model": model, "tokens": tokens})  # type: ignore[arg-type]
        promotions.register(run_step(home.store, step, resources=Resources(cpus=os.cpu_count())), actor=ACTOR)


def _tokens(source: Home) -> dict[str, str]:
    """Fingerprints of the tokens that the newest deployment was gated on, by domain."""
    record = max((record for _, record in source.store.records("deploy")), key=lambda record: record.created_at)
    roles = record.inputs.items()
    return {role.partition("/")[2]: one.fingerprint for role, one in roles if role.startswith("tokens/")}


@contextmanager
def served(home: Home, key: str) -> Iterator[tuple[str, psutil.Process]]:
    """`moestro serve` on `home`, once all versions answer; yields its URL and process."""
    log = home.logs / "serve.log"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "moestro_services.cli", "serve", "--port", "0", "--json"],
            stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, "MOESTRO_HOME": str(home.path)},
        )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise ResourceError(f"`moestro serve` ended:\n{log.read_text()[-2000:]}")
        url = json.loads(line)["url"]
        _wait_for_both(url, key)
        yield url, psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(STOP_SECONDS)


def _wait_for_both(url: str, key: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    headers = {"Authorization": f"Bearer {key}"}
    while time.monotonic() < deadline:
        (model,) = httpx.get(f"{url}/api/models", headers=headers, trust_env=False).json()
        if [one["state"] for version in model["versions"] for one in version["replicas"]] == ["serving"] * 2:
            return
        time.sleep(0.5)
    raise ResourceError(f"The versions did not answer within {START_SECONDS} s.")


def _killed(load: Load, gateway: psutil.Process, label: str) -> Result:
    """One load, amidst which the process of the version `label` is killed."""
    running = Running(replace(load, stream=False, retry=True))
    time.sleep(load.seconds / 4)
    (server,) = [one for one in gateway.children(recursive=True) if _serves(one, label)]
    server.kill()
    (result,) = running.results()
    return result


def _serves(process: psutil.Process, label: str) -> bool:
    command = process.cmdline()
    return label in command and "moestro.inference.supervisor" not in command


def _switched(load: Load, url: str, key: str) -> Result:
    """One load, amidst which the challenger is promoted, and that is taken back."""
    running = Running(load)
    for action, body in (("promote", {"version": "challenger", "force": "measuring"}), ("rollback", {})):
        time.sleep(load.seconds / 3)
        _post(f"{url}/api/models/{load.model}/{action}", key, body)
    (result,) = running.results()
    return result


def _post(url: str, key: str, body: dict[str, Any]) -> None:
    answer = httpx.post(url, json=body, headers={"Authorization": f"Bearer {key}"}, timeout=60, trust_env=False)
    if answer.status_code >= httpx.codes.BAD_REQUEST:
        raise ResourceError(f"{url} answered {answer.status_code}: {answer.text[:500]}")


def told(found: Faults) -> Iterator[str]:
    """What happened, in words."""
    for what, result in (("kill -9 of the champion", found.killed), ("Promotion and rollback", found.switched)):
        versions = ", ".join(f"{count} by {name}" for name, count in sorted(result.fingerprints.items()))
        yield (
            f"{what}, amidst {result.seconds:.0f} s of load: {result.answered} requests answered ({versions}), "
            f"{result.unavailable} clean 503, {sum(result.failed.values())} failed; at most {result.longest_gap:.1f} s "
            "passed without an answer."
        )


def bounds(found: Faults, name: str) -> Iterator[dict[str, Any]]:
    """No request without an answer or a clean 503, none while switching, and no version but the right one."""
    failed, lost = sum(found.killed.failed.values()), sum(found.switched.failed.values())
    strange = sum(count for version, count in found.killed.fingerprints.items() if version != f"{name}@1")
    back = float(found.killed.last_gap < found.killed.longest_gap)
    seen = len(set(found.switched.fingerprints) & {f"{name}@1", f"{name}@2"})
    yield {"what": "killed: neither answered nor a clean 503", "value": failed, "limit": "= 0", "ok": failed == 0}
    yield {"what": "killed: answers of another version", "value": strange, "limit": "= 0", "ok": strange == 0}
    yield {"what": "killed: back without hands", "value": back, "limit": "= 1", "ok": back == 1}
    yield {"what": "switched: failed requests", "value": lost, "limit": "= 0", "ok": lost == 0}
    yield {"what": "switched: versions that answered", "value": seen, "limit": "= 2", "ok": seen == 2}
