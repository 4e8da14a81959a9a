"""The bench of branches at toy size: what it measures, and when it falls short."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moestro_kernels.timing import Timing
from moestro_services.bench_branches import report

TOY = "import json; from moestro_services.bench_branches import bench; print(json.dumps(bench(1.0, 1, 1)))"


@pytest.mark.slow
def test_it_measures_every_variant(tmp_path: Path) -> None:
    environment = {**os.environ, "MOESTRO_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", TOY], capture_output=True, text=True, check=True, env=environment)
    told = json.loads(done.stdout.splitlines()[-1])
    assert [row[0] for row in told["rows"][:3]] == ["one worker", "two workers", "one branch on two workers together"]
    assert [bound["limit"] for bound in told["bounds"]] == [">= 1.7", "<= 15"]
    assert all(math.isfinite(bound["value"]) and bound["value"] > 0 for bound in told["bounds"])


def test_what_falls_short_is_told() -> None:
    taken = {"one worker": Timing((60.0, 70.0)), "two workers": Timing((40.0, 35.0)), "together": Timing((40.0, 40.0))}
    speedup, start = report([9.0, 16.0], taken, [30.0], 100)["bounds"]
    assert (speedup["value"], speedup["ok"]) == (1.75, True)
    assert (start["value"], start["ok"]) == (16.0, False)
