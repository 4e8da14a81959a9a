"""`Child`: a server of someone else's, run in a process group that ends with this process, kill -9 included."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx

from moestro.errors import ResourceError

STOP_SECONDS = 20
POLL_SECONDS = 0.2
START_SECONDS = 300


class Child:
    """One running command under `moestro.inference.supervisor`; what it prints goes to the file `log`."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], *, log: Path) -> None:
        self.name = name
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        reading, self._lifeline = os.pipe()
        supervisor = [sys.executable, "-m", "moestro.inference.supervisor", str(reading)]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [*supervisor, *command],
                pass_fds=[reading],
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environment),
            )
        os.close(reading)

    def wait_until_it_answers(self, url: str, timeout: float = START_SECONDS) -> None:
        """Wait until GET `url` is answered with 200; raises `ResourceError` if that does not happen."""
        deadline = time.monotonic() + timeout
        while not _answers(url):
            self.check()
            if time.monotonic() > deadline:
                raise ResourceError(f"{self.name} did not answer within {timeout:.0f} s.", hint=f"See {self.log}.")
            try:
                self._process.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                continue

    def check(self) -> None:
        """Raise `ResourceError` if the command has ended."""
        if (code := self._process.poll()) is not None:
            raise ResourceError(f"{self.name} ended with code {code}.", hint=f"See {self.log}.")

    def __enter__(self) -> "Child":
        """The running command."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the command and everything it started."""
        os.close(self._lifeline)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, 9)
            self._process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5, trust_env=False).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False
