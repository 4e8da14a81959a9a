"""Settings for all tests."""

import os

# Tiny matrices on two threads spend their time waiting for each other, most of all on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
