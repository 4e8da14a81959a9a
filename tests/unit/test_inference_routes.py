"""Which routing vLLM returns for a checkpoint, and what its rows must be."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moestro.errors import InputError, ResourceError
from moestro.inference.routes import (
    RoutingShape,
    attention_window,
    check_routes,
    require_routing,
    returned_routing,
    routing_shape,
    window_is_wide_enough,
)


def written(folder: Path, **config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 4, "num_experts_per_tok": 2} | config))
    return folder


@pytest.mark.parametrize(
    ("config", "experts", "dense"),
    [
        ({"model_type": "mixtral", "num_local_experts": 4}, 4, ()),
        ({"model_type": "qwen3_moe", "num_experts": 6, "mlp_only_layers": [2], "decoder_sparse_step": 2}, 6, (0, 2)),
        ({"model_type": "glm4_moe", "n_routed_experts": 8, "first_k_dense_replace": 1}, 8, (0,)),
    ],
)
def test_experts_and_dense_layers_are_found(config: Any, experts: int, dense: tuple[int, ...], tmp_path: Path) -> None:
    assert routing_shape(written(tmp_path, **config)) == RoutingShape(4, experts, 2, dense)


@pytest.mark.parametrize(
    ("config", "window"),
    [
        ({"sliding_window": 64}, 64),
        ({"sliding_window": None}, None),
        ({"sliding_window": 64, "use_sliding_window": False}, None),
        ({"sliding_window": 64, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 4}, 64),
        ({"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"] * 2}, None),
    ],
)
def test_a_window_counts_where_no_layer_sees_all(config: Any, window: int | None, tmp_path: Path) -> None:
    folder = written(tmp_path, model_type="mixtral", num_local_experts=4, **config)
    assert attention_window(folder) == window
    assert window_is_wide_enough(folder, 64) == (window == 64)
    assert not window_is_wide_enough(folder, 65)
    assert returned_routing(folder, 64) == RoutingShape(4, 4, 2)
    assert (returned_routing(folder, 65) is None) == (window == 64)


def test_what_returns_no_routing_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"dense model.*no routing.*Mix it\."):
        require_routing(written(tmp_path, model_type="llama"), 64, hint="Mix it.")
    folder = written(tmp_path, model_type="mixtral", num_local_experts=4, sliding_window=32)
    with pytest.raises(InputError, match=r"slide over 32 positions, and sequences have up to 64\. Be brief\."):
        require_routing(folder, 64, hint="Be brief.")


def test_layers_without_experts_are_left_out_of_the_rows() -> None:
    shape = RoutingShape(3, 4, 2, dense_layers=(1,))
    routes_RLK = np.zeros((5, 3, 2), np.uint8)
    routes_RLK[:, [0, 2]] = [[0, 1], [2, 3]]
    assert np.array_equal(check_routes(routes_RLK, rows=5, shape=shape), routes_RLK[:, [0, 2]])
    with pytest.raises(ResourceError, match="twice in layer 1"):
        check_routes(routes_RLK, rows=5, shape=RoutingShape(3, 4, 2))
    with pytest.raises(ResourceError, match=r"shape \(5, 3, 2\) where \(6, 3, 2\)"):
        check_routes(routes_RLK, rows=6, shape=shape)


@pytest.mark.parametrize(("expert", "kind"), [(-1, np.int16), (4, np.uint8), (300, np.uint16)])
def test_ids_that_are_no_experts_are_refused(expert: int, kind: Any) -> None:
    routes_RLK = np.tile(np.array([0, 1], kind), (5, 3, 1))
    routes_RLK[2, 1, 0] = expert
    with pytest.raises(ResourceError, match=rf"routed to expert {expert} of 4: no real capture"):
        check_routes(routes_RLK, rows=5, shape=RoutingShape(3, 4, 2))
