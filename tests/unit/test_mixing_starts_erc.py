"""How routers start from weights alone: rows that excite the expert made for them more than any other (ERC)."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moestro.artifacts import Artifact, Job
from moestro.config import MixConfig, validate
from moestro.mixing import mix
from moestro.mixing.starts import router_weights
from moestro.mixing.starts.context import StartContext
from moestro.mixing.starts.erc import couple
from moestro.models.checkpoint import load_model
from moestro.models.coupling import activation_norms_by_grams, erc_loss
from moestro.models.routers import routers

Make = Callable[..., StartContext]
DOMAINS = ("code", "docs", "sums")
LAYERS = 2


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, write_dense: Callable[..., Path]) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    own = {"max_position_embeddings": 512, "initializer_range": 0.1, "pad_token_id": None}
    return {name: write_dense(root / name, number, **own) for number, name in enumerate(("seed", *DOMAINS))}


def config_of(router: Mapping[str, Any] | None = None, **fields: Any) -> MixConfig:
    return validate(MixConfig, {"router": {"type": "erc", "steps": 20, **(router or {})}, **fields}, where="test")


def norms_of(rows_ND: torch.Tensor, gates: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([torch.stack([(gate_FD @ row_D).norm() for gate_FD in gates]) for row_D in rows_ND])


def test_the_erc_loss_is_the_papers() -> None:
    generator = torch.Generator().manual_seed(0)
    rows_ND = torch.randn(3, 16, generator=generator)
    gates = [torch.randn(24, 16, generator=generator) for _ in range(3)]
    norms_NN = activation_norms_by_grams(rows_ND, torch.stack([gate_FD.T @ gate_FD for gate_FD in gates]))
    torch.testing.assert_close(norms_NN, norms_of(rows_ND, gates))
    for alpha in (0.0, 0.5, 1.0):
        total = 0.0
        for i in range(3):
            for j in range(3):
                if i != j:
                    total += max(float(norms_NN[i, j] - alpha * norms_NN[i, i]), 0)
                    total += max(float(norms_NN[j, i] - alpha * norms_NN[i, i]), 0)
        assert float(erc_loss(norms_NN, alpha)) == pytest.approx(total / 9, rel=1e-5)
    own_blocks_NN = torch.diag(torch.tensor([2.0, 1.5, 3.0]))
    assert float(erc_loss(own_blocks_NN, 0.5)) == 0


@pytest.mark.parametrize("alpha", [1.0, 0.8])
def test_erc_rows_excite_their_own_expert_most(alpha: float, models: dict[str, Path], start_context: Make) -> None:
    config = config_of(router={"alpha": alpha, "steps": 100, "std": 0.05})
    context = start_context(config, models, {})
    weights_LED, figures = router_weights(config.router, context)
    torch.testing.assert_close(weights_LED.square().mean(dim=2).sqrt(), torch.full((LAYERS, 4), 0.05))
    losses = []
    for layer in range(LAYERS):
        gates = [
            context.models[name][f"model.layers.{layer}.mlp.gate_proj.weight"].read() for name in (*DOMAINS, "seed")
        ]
        norms_NN = norms_of(weights_LED[layer], gates)
        own_N1 = norms_NN.diagonal()[:, None]
        assert (norms_NN < own_N1 + 1e6 * torch.eye(4)).all()
        losses.append(float(erc_loss(norms_NN / norms_NN.mean(), alpha)))
    assert figures["erc_loss"]["after"] == pytest.approx(sum(losses) / LAYERS, abs=1e-6)
    assert figures["erc_loss"]["after"] < 0.1 * figures["erc_loss"]["before"]


def test_erc_does_not_descend_to_where_no_expert_reacts() -> None:
    generator = torch.Generator().manual_seed(1)
    gates = torch.randn(4, 24, 32, generator=generator)
    gates[:, :, :8] *= 0.01
    drawn_ND = torch.nn.functional.normalize(torch.randn(4, 32, generator=generator), dim=1)
    grams_NDD = gates.mT @ gates
    before_NN = activation_norms_by_grams(drawn_ND, grams_NDD)
    losses = []
    for steps in (1, 10, 100):
        rows_ND = couple(drawn_ND, grams_NDD, alpha=0.3, steps=steps, generator=torch.Generator().manual_seed(2))
        norms_NN = activation_norms_by_grams(rows_ND, grams_NDD)
        assert norms_NN.mean() > 0.5 * before_NN.mean()
        losses.append(float(erc_loss(norms_NN / norms_NN.mean(), 0.3)))
    assert losses[0] > losses[1] > losses[2]


def test_erc_has_nothing_to_couple_where_experts_are_alike(models: dict[str, Path], start_context: Make) -> None:
    config = config_of(router={"alpha": 0.5})
    context = start_context(config, dict.fromkeys(models, models["code"]), {})
    weights_LED, figures = router_weights(config.router, context)
    torch.testing.assert_close(weights_LED.square().mean(dim=2).sqrt(), torch.full((LAYERS, 4), 0.02))
    assert all(np.isfinite(value) for value in figures["erc_loss"].values())


def test_erc_couples_copies_of_the_seed_that_were_partly_drawn_anew(
    models: dict[str, Path], start_context: Make
) -> None:
    config = config_of(experts={"type": "drop_upcycling", "num_experts": 3})
    context = start_context(config, {"seed": models["seed"]}, {})
    weights_LED, figures = router_weights(config.router, context)
    assert figures["erc_loss"]["after"] < 0.1 * figures["erc_loss"]["before"]
    assert weights_LED.shape[1] == 3


def test_experts_that_nothing_excites_leave_rows_finite() -> None:
    drawn_ND = torch.eye(4, 8)
    grams_NDD = torch.zeros(4, 8, 8)
    grams_NDD[0] = torch.eye(8)
    for number in (4, 1):
        rows_ND = couple(drawn_ND[:number], grams_NDD[:number], alpha=0.5, steps=5, generator=torch.Generator())
        assert torch.isfinite(rows_ND).all()


def test_figures_stand_in_the_stages_result_and_rows_in_the_checkpoint(
    models: dict[str, Path], start_context: Make, tmp_path: Path
) -> None:
    config = config_of(num_experts_per_tok=1)
    branches = {name: Artifact(models[name], "branch", name) for name in DOMAINS}
    (tmp_path / "out").mkdir()
    result = mix(
        config,
        seed=Artifact(models["seed"], "seed", "seed"),
        branches=branches,
        tokens={},
        job=Job(out=tmp_path / "out", scratch=tmp_path),
    )
    weights_LED, figures = router_weights(config.router, start_context(config, models, {}))
    assert result["erc_loss"] == figures["erc_loss"]
    for layer, router in enumerate(routers(load_model(tmp_path / "out"))):
        assert torch.equal(router.weight.data, weights_LED[layer])
