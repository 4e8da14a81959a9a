"""What the flow's threads import."""

import os
import subprocess
import sys
from pathlib import Path

OPENED = """
import sys
from contextlib import nullcontext
from types import SimpleNamespace

from moestro_flows import stages

names = SimpleNamespace(names=lambda role: ("code", "prose"))
session = SimpleNamespace(
    to_run=frozenset({"branch code"}),
    needs_cluster=True,
    config=SimpleNamespace(data=names),
    cluster=SimpleNamespace(connect=lambda workers: None),
)
stages.load_lifecycle = lambda path: None
stages.Session = SimpleNamespace(open=lambda home, config: nullcontext(session))
assert "transformers" not in sys.modules
with stages._opened(None, None):
    assert "PreTrainedModel" in dir(sys.modules["transformers"])
"""


def test_transformers_is_there_before_threads_import_it(tmp_path: Path) -> None:
    """Importing it in two threads at once can fail in the second."""
    environment = os.environ | {"MOESTRO_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", OPENED], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
