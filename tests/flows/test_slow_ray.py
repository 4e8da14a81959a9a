"""Ray on a machine so busy that its node needs more than the 30 s that Ray waits by default."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

HELD_SECONDS = 33
DRIVER = """
import signal, sys, threading, time
from contextlib import suppress

import psutil
from moestro.cluster import Cluster
from moestro_flows.home import Home


def hold():
    while not (nodes := [child for child in psutil.Process().children(recursive=True) if is_node(child)]):
        time.sleep(0.005)
    nodes[0].send_signal(signal.SIGSTOP)
    time.sleep(float(sys.argv[1]))
    nodes[0].send_signal(signal.SIGCONT)


def is_node(process):
    with suppress(psutil.NoSuchProcess):
        return process.name() == "raylet"


Home.current().prepare()
holding = threading.Thread(target=hold)
holding.start()
cluster = Cluster(cpus=1)
try:
    cluster.connect()
    print("connected")
finally:
    holding.join()
    cluster.shutdown()
"""


def test_a_node_that_takes_long_to_start_is_waited_for(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", DRIVER, str(HELD_SECONDS)]
    environment |= {"MOESTRO_HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, check=False)
    assert done.stdout.split() == ["connected"], done.stderr
