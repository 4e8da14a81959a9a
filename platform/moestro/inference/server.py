"""`VllmServer`: vLLM's OpenAI-compatible server as a supervised child on the loopback interface.

The server and its engine live in a process group of their own under `supervisor`, which ends them when this process
closes the server or dies, kill -9 included. It listens on loopback alone, its development endpoints are off, and it
answers, but for /health, only who bears a key that is made anew at every start and told to it in its environment:
whoever reaches another server's port, or that of an earlier start, gets a 401 and not another model's answer.
"""

import contextlib
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from moestro.errors import BusyError, ResourceError
from moestro.inference.environment import computes_on_cpu, server_environment
from moestro.inference.guard import KEY_VARIABLE, Keyed
from moestro.inference.routes import returned_routing, window_is_wide_enough

HOST = "127.0.0.1"
POLL_SECONDS = 0.25
STOP_SECONDS = 20
LOG_LINES = 25
KEEP_ALIVE_SECONDS = 60
"""How long a server keeps an idle connection open; clients drop theirs well before."""
NEVER_SET = (
    "VLLM_SERVER_DEV_MODE",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
    "VLLM_ALLOW_INSECURE_SERIALIZATION",
    "VLLM_DEBUG_LOG_API_SERVER_RESPONSE",
    "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH",
    "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION",
)
"""What of the environment no server gets: control endpoints, code from requests, answers in logs, shared ids."""


@dataclass(frozen=True)
class ServerConfig:
    """How a checkpoint is served."""

    name: str
    """Name of the model in requests."""
    dtype: str = "float32"
    """Type vLLM computes in."""
    max_model_len: int = 512
    """Longest sequence."""
    port: int = 0
    """Port on the loopback interface; 0 takes a free one."""
    kv_cache_gib: float = 0.5
    """Memory of the KV cache in GiB."""
    threads: int | None = None
    """Threads the engine computes with; None leaves them to torch."""
    tool_call_parser: str = ""
    """vLLM's parser of tool calls; empty parses none."""
    fingerprint: str = ""
    """What every answer bears as its `system_fingerprint`; empty leaves it to vLLM."""
    extra_arguments: tuple[str, ...] = ()
    """Further arguments of vLLM's server, after all others."""
    extra_environment: Mapping[str, str] = field(default_factory=dict)
    """What is added to its environment."""


class VllmServer:
    """One server. `start` it, use `url` and `api_key`, `stop` it; also a context manager that stops it.

    It can be started again after it was stopped, with a new key and, if the port was left open, on a new port. `stop`
    may be called by another thread than the one that is in `start` or `wait`, and ends those.
    """

    def __init__(self, folder: Path, config: ServerConfig, *, log: Path) -> None:
        """The checkpoint in `folder` (with tokenizer); what the server prints goes to the file `log`."""
        self.folder = folder
        self.config = config
        self.log = log
        self.port = config.port
        self.api_key = ""
        """What requests must bear; made at every start."""
        self.routes = returned_routing(folder, config.max_model_len) is not None
        """Whether answers carry expert choices."""
        self._process: subprocess.Popen[bytes] | None = None
        self._lifeline = -1
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """Where it answers, without a trailing slash."""
        return f"http://{HOST}:{self.port}"

    def start(self, timeout: float = 600) -> None:
        """Start and wait until it answers.

        Raises `BusyError` if the port is in use, `ResourceError` with the end of the log if the server ends or does
        not answer within `timeout` seconds.
        """
        self.stop()
        self.port = _free_port(self.config.port)
        self.api_key = secrets.token_urlsafe(32)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        process = self._spawn()
        try:
            self._until_it_answers(process, timeout)
        except BaseException:
            self.stop()
            raise

    def healthy(self) -> bool:
        """Whether the server answers and its engine lives."""
        try:
            return httpx.get(f"{self.url}/health", timeout=5, trust_env=False).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def exited(self) -> bool:
        """Whether there is no process, because it ended or was never started."""
        process = self._process
        return process is None or process.poll() is not None

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the process has ended, at most `timeout` seconds; whether it has. Returns as it ends."""
        process = self._process
        if process is None or process.poll() is not None:
            return True
        try:
            ended = os.pidfd_open(process.pid)
        except ProcessLookupError:
            return True
        try:
            return bool(select.select([ended], [], [], timeout)[0])
        finally:
            os.close(ended)

    def stop(self) -> None:
        """End the server and everything it started; does nothing if it does not run."""
        with self._lock:
            process, self._process = self._process, None
            if process is None:
                return
            os.close(self._lifeline)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def __enter__(self) -> "VllmServer":
        """The server itself, started by now or by the caller."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self.stop()

    def _spawn(self) -> subprocess.Popen[bytes]:
        with self._lock, self.log.open("wb") as output:
            reading, self._lifeline = os.pipe()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "moestro.inference.supervisor", str(reading), *self._command()],
                pass_fds=[reading],
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment(),
            )
            os.close(reading)
            return self._process

    def _until_it_answers(self, process: subprocess.Popen[bytes], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not self.healthy():
            try:
                code = process.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                if time.monotonic() > deadline:
                    raise ResourceError(
                        f"The vLLM server for {self.folder} did not answer within {timeout:.0f} s.\n{self._log_end()}"
                    ) from None
            else:
                raise ResourceError(
                    f"The vLLM server for {self.folder} ended with code {code}. {self.log} ends with:\n"
                    f"{self._log_end()}"
                )

    def _log_end(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_LINES:])

    def _environment(self) -> dict[str, str]:
        threads = {"OMP_NUM_THREADS": str(self.config.threads)} if self.config.threads else {}
        own = {KEY_VARIABLE: self.api_key, "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(KEEP_ALIVE_SECONDS)}
        kept = {name: value for name, value in server_environment().items() if name not in NEVER_SET}
        return kept | threads | dict(self.config.extra_environment) | own

    def _command(self) -> list[str]:
        options = {
            "--model": str(self.folder),
            "--served-model-name": self.config.name,
            "--host": HOST,
            "--port": str(self.port),
            "--dtype": self.config.dtype,
            "--max-model-len": str(self.config.max_model_len),
            "--kv-cache-memory-bytes": str(int(self.config.kv_cache_gib * 1024**3)),
            "--generation-config": "vllm",
            "--allowed-origins": "[]",
            "--middleware": f"{Keyed.__module__}.{Keyed.__name__}",
        }
        if self.config.fingerprint:
            options |= {"--fingerprint-mode": "custom", "--fingerprint-value": self.config.fingerprint}
        flags = ["--enforce-eager", "--disable-uvicorn-access-log"]
        if self.routes:
            flags.append("--enable-return-routed-experts")
        if window_is_wide_enough(self.folder, self.config.max_model_len):
            flags.append("--disable-sliding-window")
        if self.config.tool_call_parser:
            flags += ["--enable-auto-tool-choice", "--tool-call-parser", self.config.tool_call_parser]
        if computes_on_cpu():
            # A sampled request with a `seed` whose prompt is prefilled in two steps would end the engine, and with it
            # everybody's requests: vLLM turns such a request's generator back, which one of a CPU cannot.
            flags.append("--no-enable-chunked-prefill")
        module = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        return module + [part for option in options.items() for part in option] + flags + [*self.config.extra_arguments]


def _free_port(port: int) -> int:
    """`port` if nothing listens on it, any free one for 0; raises `BusyError`."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise BusyError(f"Port {port} is in use ({error.strerror}).", hint="Choose another port.") from None
        free: int = probe.getsockname()[1]
        return free
