"""What a home knows of its deployments' routing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from moestro.artifacts import Input
from moestro.errors import ArtifactError, InputError
from moestro.inference.routes import RoutingShape
from moestro_flows.home import Home
from moestro_services.catalog import Catalog
from moestro_services.gateway.deployments import Deployment
from moestro_services.gateway.expert_metrics_known import KnownAtHome, read_profile


def test_a_home_knows_how_its_checkpoints_route(made: Any, built_home: Home) -> None:
    here = KnownAtHome(built_home)
    compressed = Catalog(built_home).published("compress")
    config = {"model_type": "mixtral", "num_hidden_layers": 2, "num_local_experts": 2, "num_experts_per_tok": 2}
    (compressed.path / "config.json").write_text(json.dumps(config))
    checkpoint = Input(stage="compress", fingerprint=compressed.record.fingerprint)
    deployment = Deployment(**vars(made.deployed()) | {"checkpoint": checkpoint})
    assert here.shape(deployment) == RoutingShape(2, 2, 2)
    found = here.profile(deployment)
    assert found is not None
    assert (found.domains, found.counts_DLE.shape) == (("code", "prose"), (2, 2, 2))
    assert found.fingerprint == Catalog(built_home).published("profile").record.fingerprint
    assert here.profile(made.deployed()) is None
    with pytest.raises(InputError, match="not a directory"):
        here.shape(made.deployed())


def test_a_profile_leaves_out_domains_without_tokens_and_must_be_readable(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not a readable profile"):
        read_profile(tmp_path, "p")
    full, empty = np.ones((2, 4), np.int64), np.zeros((2, 4), np.int64)
    save_file({"counts/a": full, "counts/b": empty, "tokens/a": np.array([4])}, tmp_path / "routing.safetensors")
    found = read_profile(tmp_path, "p")
    assert found is not None
    assert found.domains == ("a",)
    save_file({"counts/b": empty}, tmp_path / "routing.safetensors")
    assert read_profile(tmp_path, "p") is None
    (tmp_path / "routing.safetensors").write_bytes(b"no")
    with pytest.raises(ArtifactError, match="not a readable profile"):
        read_profile(tmp_path, "p")
