"""`moestro serve` and `moestro ui` as users start them: real servers in real processes, none of which stays."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest


@pytest.fixture
def deployed_home(tmp_path: Path, deploy_tiny: Any) -> Path:
    deploy_tiny(tmp_path / "home", seed=0)
    return tmp_path / "home"


@contextmanager
def moestro(home: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A running command; whatever the test did, nothing of it is left."""
    log = home / "stderr.log"
    home.mkdir(exist_ok=True)
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "moestro_services.cli", *arguments, "--json"],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={key: value for key, value in os.environ.items() if key not in ("PREFECT_API_URL",)}
            | {"MOESTRO_HOME": str(home)},
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


def first_document(process: subprocess.Popen[str], home: Path) -> dict[str, str]:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, (home / "stderr.log").read_text()
    document: dict[str, str] = json.loads(line)
    return document


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found: list[psutil.Process] = psutil.Process(process.pid).children(recursive=True)
    assert found
    return found


@pytest.mark.slow
def test_a_real_model_is_served_and_nothing_stays(deployed_home: Path) -> None:
    with moestro(deployed_home, "serve", "--no-auth", "--port", "0") as process:
        url = first_document(process, deployed_home)["url"]
        children = family(process)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        asked: dict[str, Any] = {"model": "tiny", "prompt": "Question: 12", "max_tokens": 8, "temperature": 0}
        whole = client.completions.create(**asked)
        parts = [chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True)]
        assert len(parts) > 1
        assert "".join(parts) == whole.choices[0].text
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 8
        with pytest.raises(openai.BadRequestError, match="chat template"):
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hello"}])
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="tiny", prompt="1 " * 200, max_tokens=8)
        assert whole.system_fingerprint == "tiny@0"
        ready = httpx.get(f"{url}/ready").json()
        assert (ready["ready"], ready["models"]) == (True, {"tiny": True})
        assert httpx.get(f"{url}/api/deployments").json()[0]["state"] == "serving"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert psutil.wait_procs(children, timeout=30)[1] == []


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_ui_runs_three_servers_that_end_with_it(tmp_path: Path, end: signal.Signals) -> None:
    home = tmp_path / "home"
    ports = ("--gateway-port", "0", "--mlflow-port", "0", "--prefect-port", "0")
    with moestro(home, "ui", "--no-auth", *ports) as process:
        addresses = first_document(process, home)
        children = family(process)
        assert set(addresses) == {"mlflow", "prefect", "gateway"}
        for url in addresses.values():
            assert httpx.get(url + ("/ready" if url == addresses["gateway"] else "/")).status_code == 200
        process.send_signal(end)
        assert process.wait(60) == (0 if end == signal.SIGINT else -signal.SIGKILL)
        assert psutil.wait_procs(children, timeout=60)[1] == []
