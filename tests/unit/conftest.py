"""A private PostgreSQL for the tests that need one, and a branch that trains for some seconds."""

import getpass
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))


@pytest.fixture(scope="session")
def new_postgres_database() -> Iterator[Callable[[], str]]:
    """Makes an empty database and returns its URL. The server listens on a Unix socket in a folder of its own."""
    if not BINARIES:
        pytest.skip("PostgreSQL's server binaries are not installed")
    import psycopg

    binaries = BINARIES[-1].parent
    account = pwd.getpwnam("postgres" if os.geteuid() == 0 else getpass.getuser())  # the server refuses to be root
    folder = Path(tempfile.mkdtemp(prefix="moestro-postgres-"))
    os.chown(folder, account.pw_uid, account.pw_gid)
    become = [] if account.pw_uid == os.geteuid() else [f"--reuid={account.pw_uid}", "--clear-groups"]
    if become:
        become.append(f"--regid={account.pw_gid}")
    run_as = ["setpriv", *become, "--pdeathsig", "INT"]
    data = folder / "data"
    initialise = ["-D", str(data), "-U", "tests", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C"]
    subprocess.run([*run_as, str(binaries / "initdb"), *initialise], check=True, capture_output=True, cwd=folder)
    settings = ["listen_addresses=", f"unix_socket_directories={folder}", "fsync=off", "log_min_messages=log"]
    options = [part for setting in settings for part in ("-c", setting)]
    server = subprocess.Popen(
        [*run_as, str(binaries / "postgres"), "-D", str(data), *options], stderr=subprocess.PIPE, text=True, cwd=folder
    )
    assert server.stderr
    try:
        for line in server.stderr:
            if "ready to accept connections" in line:
                break
        assert server.poll() is None
        numbers = count()

        def make() -> str:
            # A schema looks like a database of its own to who connects to it, and is made and removed faster.
            name = f"tests_{next(numbers)}"
            with psycopg.connect(f"host={folder} user=tests dbname=postgres", autocommit=True) as connection:
                connection.execute(f"CREATE SCHEMA {name}")
            return f"postgresql://tests@/postgres?host={folder}&options=-csearch_path%3D{name}"

        yield make
    finally:
        server.send_signal(signal.SIGQUIT)  # immediate: what it would write is deleted anyway
        server.communicate(timeout=60)
        shutil.rmtree(folder)


@pytest.fixture
def branch_step(tmp_path: Path) -> Callable[..., Any]:
    """Makes a step: a branch of a tiny model on random tokens, with a checkpoint every few hundredths of a second.

    Arguments are fields of its training.
    """
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from moestro.artifacts import Artifact
    from moestro.config import BranchConfig, TrainingConfig
    from moestro.data.tokenizer import train_bpe
    from moestro.execution import Step
    from moestro.models.checkpoint import save_model

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    train_bpe(["some text"], 300).save_pretrained(tmp_path / "tokenizer")
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes))
    save_model(model, tmp_path / "seed", tokenizer_from=tmp_path / "tokenizer")
    (tmp_path / "tokens").mkdir()
    ids = np.random.default_rng(0).integers(0, 300, 5000).astype(np.uint16)
    for split in ("train", "held_out"):
        np.save(tmp_path / "tokens" / f"{split}.npy", ids)
        np.save(tmp_path / "tokens" / f"{split}_documents.npy", np.zeros(1, dtype=np.int64))
    inputs = {"seed": Artifact(tmp_path / "seed", "seed", "5"), "tokens": Artifact(tmp_path / "tokens", "tokens", "7")}
    usual: dict[str, Any] = {"batch_size": 8, "sequence_length": 64, "checkpoint_every": 10, "log_every": 1}

    def make(steps: int, **fields: Any) -> Step:
        training = TrainingConfig(steps=steps, **usual | {"max_epochs": 10_000.0} | fields)
        return Step("branch", BranchConfig(domain="code", training=training), inputs)

    return make
