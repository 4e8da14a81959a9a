"""Settings for all tests, and tiny models: config fields of dense ones, and Mixtures-of-Experts of every kind."""

import os
import secrets
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

# Tiny matrices on two threads spend their time waiting for each other, most of all on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray settles in a process's first `init` whether it authenticates. A cluster that a later test starts there would do
# otherwise, and Ray would take every actor's owner for dead: so all clusters of this process have one secret.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}

_SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_DENSE = _SMALL | {"intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
_SPARSE = _SMALL | {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
}
_GLM = {"n_shared_experts": 1, "first_k_dense_replace": 0, "partial_rotary_factor": 1.0, "routed_scaling_factor": 1.5}
MOE_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "qwen2_moe": ("qwen2_moe", {"shared_expert_intermediate_size": 64, "norm_topk_prob": True}),
    "qwen2_moe unshared": ("qwen2_moe", {"shared_expert_intermediate_size": 0, "norm_topk_prob": True}),
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True}),
    "olmoe": ("olmoe", {"norm_topk_prob": False}),
    "flex_olmo": ("flex_olmo", {"norm_topk_prob": True}),
    "granitemoe": ("granitemoe", {"logits_scaling": 3.0, "residual_multiplier": 0.7, "attention_multiplier": 0.2}),
    "glm4_moe": ("glm4_moe", _GLM),
    "glm4_moe grouped": ("glm4_moe", _GLM | {"n_group": 3, "topk_group": 2, "attention_bias": True}),
}
"""Architecture and config fields of what mixing makes, and of OLMoE, which leaves its gates as they are."""


@pytest.fixture(scope="session")
def dense_fields() -> dict[str, Any]:
    """Config fields of a tiny dense model, whatever its architecture."""
    return dict(_DENSE)


@pytest.fixture(params=MOE_KINDS)
def moe_kind(request: pytest.FixtureRequest) -> str:
    """Every kind of Mixture-of-Experts, one after the other."""
    return str(request.param)


@pytest.fixture(scope="session")
def tiny_moe() -> Callable[..., Any]:
    """Makes a random model of a kind, with 6 experts of width 96 of which a token chooses 2, in evaluation mode.

    Correction biases are random too. Further arguments are config fields.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from moestro.models.layouts import LAYOUTS

    def make(kind: str, *, seed: int = 1, num_experts: int = 6, dtype: Any = torch.float32, **fields: Any) -> Any:
        model_type, special = MOE_KINDS[kind]
        layout = LAYOUTS[model_type]
        sizes = {"intermediate_size": 96, layout.expert_width: 96, layout.num_experts: num_experts}
        config = AutoConfig.for_model(model_type, **_SPARSE | sizes | special | fields)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        for name, bias in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                bias.normal_(std=0.2)
        return model

    return make


@contextmanager
def _environment_kept() -> Iterator[None]:
    """Takes back what has changed and touches nothing else: a thread of a C library that reads the environment while a
    variable is added or taken away can end the process (getenv(3) is not safe beside setenv(3))."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    for name, value in before.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


@pytest.fixture(autouse=True, scope="module")
def _fixtures_keep_the_environment() -> Iterator[None]:
    """What a module's own fixtures set in this process's environment, as commands do that they call, ends with it."""
    with _environment_kept():
        yield


@pytest.fixture(autouse=True)
def _tests_keep_the_environment(_fixtures_keep_the_environment: None) -> Iterator[None]:
    """What a test sets in this process's environment no other test, and no process that one starts, shall see."""
    with _environment_kept():
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread in this process: tiny models are several times slower on threads that wait for one another, and sums
    are then the same in every run."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def _prepared_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database that a tracker has prepared: making one takes seconds, copying it does not."""
    from moestro.registry import Tracker

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    Tracker(f"sqlite:///{path}", (path.parent / "mlflow").as_uri()).prepare()
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return path


@pytest.fixture
def prepare_mlflow(_prepared_mlflow: Path) -> Callable[[Path], None]:
    """Gives a home folder an MLflow database of its own, as `Tracker.prepare` would."""

    def prepare(home: Path) -> None:
        files = home / "mlflow"
        files.mkdir(parents=True)
        shutil.copy(_prepared_mlflow.with_name("mlflow") / "home_id", files)
        shutil.copy(_prepared_mlflow, home / "mlflow.db")
        with closing(sqlite3.connect(home / "mlflow.db")) as database, database:
            database.execute("update experiments set artifact_location = ?", [f"{files.as_uri()}/moestro"])

    return prepare
