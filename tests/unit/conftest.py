"""A private PostgreSQL for the tests that need one, a branch that trains for some seconds, and models to be mixed."""

import getpass
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
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


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of a tokenizer of fewer than 300 ids."""
    from moestro.data.tokenizer import train_bpe

    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(["while True: pass"] * 4, 300).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def write_dense(dense_fields: dict[str, Any], tokenizer: Path) -> Callable[..., Path]:
    """Writes a dense checkpoint with the random weights of a seed. Further arguments are fields of its config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from moestro.models.checkpoint import save_model

    def write(
        folder: Path,
        seed: int,
        *,
        kind: str = "llama",
        dtype: Any = torch.float32,
        tokenizer_from: Path = tokenizer,
        **fields: Any,
    ) -> Path:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **dense_fields | fields), dtype=dtype)
        save_model(model, folder, tokenizer_from=tokenizer_from)
        return folder

    return write


DENSE = {
    "mixtral": "llama",
    "qwen2_moe": "qwen2",
    "qwen3_moe": "qwen3",
    "flex_olmo": "olmo2",
    "granitemoe": "granite",
    "glm4_moe": "llama",
}
"""`model_type` of a dense model by that of the Mixture-of-Experts it becomes."""


class Family:
    """Dense checkpoints in the folder `root`, and what they are mixed to, of the type `target`."""

    def __init__(self, root: Path, target: str, write_dense: Callable[..., Path]) -> None:
        self.root, self.target, self.write_dense = root, target, write_dense

    def dense(self, name: str, seed: int, **fields: Any) -> Any:
        from moestro.artifacts import Artifact

        own = {"head_dim": 16} if self.target == "qwen3_moe" else {}
        self.write_dense(self.root / name, seed, kind=DENSE[self.target], **own | fields)
        return Artifact(self.root / name, "branch", name)

    def four(self) -> list[Any]:
        """A seed, and its branches `code`, `docs` and `law`."""
        return [self.dense(name, number) for number, name in enumerate(("seed", "code", "docs", "law"))]

    def mixed(self, name: str, branches: dict[str, Any], seed: Any, **fields: Any) -> Any:
        from moestro.artifacts import Artifact, Job
        from moestro.config import MixConfig, RandomRouter
        from moestro.mixing import mix

        out = self.root / name
        out.mkdir()
        config = MixConfig(target=self.target, router=RandomRouter(std=0.5), **fields)
        mix(config, seed=seed, branches=branches, tokens={}, job=Job(out=out, scratch=self.root))
        return Artifact(out, "mix", name)

    def three_mixed(self) -> tuple["Family", Any, Any]:
        """Itself, the mix of `code`, `docs` and the seed, and the branch `law`, which is not in it."""
        seed, code, docs, law = self.four()
        return self, self.mixed("moe", {"code": code, "docs": docs}, seed), law


@pytest.fixture(scope="session")
def make_family(write_dense: Callable[..., Path]) -> Callable[[Path, str], Family]:
    """Makes a `Family` in a folder, by the type of its Mixture-of-Experts."""
    return lambda root, target: Family(root, target, write_dense)


@pytest.fixture(scope="module", params=DENSE)
def mixed_family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, make_family: Callable[[Path, str], Family]
) -> tuple[Family, Any, Any]:
    """`Family.three_mixed` of every type, one after the other."""
    return make_family(tmp_path_factory.mktemp(request.param), request.param).three_mixed()


@pytest.fixture(scope="session")
def mixtral_family(
    tmp_path_factory: pytest.TempPathFactory, make_family: Callable[[Path, str], Family]
) -> tuple[Family, Any, Any]:
    """`Family.three_mixed` of a Mixtral."""
    return make_family(tmp_path_factory.mktemp("mixtral"), "mixtral").three_mixed()


@pytest.fixture(scope="session")
def run_append() -> Callable[..., dict[str, Any]]:
    """Appends a branch to a model and returns the stage's result. Further arguments are fields of its config."""
    from moestro.artifacts import Job
    from moestro.config import AppendConfig
    from moestro.mixing import append

    def run(model: Any, branch: Any, out: Path, tokens: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
        out.mkdir(parents=True)
        config = AppendConfig(**{"domain": "law", "router": {"type": "mean"}} | fields)
        return append(config, model=model, branch=branch, tokens=tokens or {}, job=Job(out=out, scratch=out.parent))

    return run


@pytest.fixture(scope="session")
def start_context(dense_fields: dict[str, Any]) -> Callable[..., Any]:
    """What a router starts from, by a mix's config and folders of models and tokens of `code`, `docs` and `sums`."""
    from moestro.mixing.recipes import plan_experts
    from moestro.mixing.starts.context import StartContext
    from moestro.models.weights import StoredWeights

    def make(config: Any, models: Mapping[str, Path], tokens: Mapping[str, Path]) -> StartContext:
        widths = dict.fromkeys(("code", "docs", "sums", "seed"), dense_fields["intermediate_size"])
        return StartContext(
            plan=plan_experts(config, widths),
            layers=dense_fields["num_hidden_layers"],
            hidden=dense_fields["hidden_size"],
            longest=512,
            unknown_ids=range(320, 320),
            folders=models,
            models={name: StoredWeights(folder) for name, folder in models.items()},
            tokens=tokens,
        )

    return make
