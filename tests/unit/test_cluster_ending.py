"""A task may end in the moment in which it is cancelled."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

DRIVER = """
import ray
from moestro.cluster.ending import end_task

ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=80_000_000)

@ray.remote(max_retries=0)
def fails():
    raise ValueError

for _ in range(300):
    reference = fails.remote()
    try:
        ray.get(reference)
    except ValueError:
        end_task(reference, force=True)
print("alive")
"""


def test_ending_what_has_just_failed_leaves_the_driver_alive() -> None:
    """With `ray.cancel` instead the driver aborts, at the latest after a hundred tasks."""
    done = subprocess.run([sys.executable, "-c", DRIVER], capture_output=True, text=True, timeout=500, check=False)
    assert (done.stdout.split(), done.returncode) == (["alive"], 0), done.stderr
