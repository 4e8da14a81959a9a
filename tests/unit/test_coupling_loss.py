"""Coupling rows with experts while both train (ERC). N rows and experts, D hidden, F intermediate."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from moestro.artifacts import Artifact, Job
from moestro.config import ErcLoss, OptimizerConfig, TrainingConfig, TuneConfig
from moestro.data.tokenizer import train_bpe
from moestro.models.checkpoint import save_model
from moestro.models.coupling import (
    activation_norms,
    activation_norms_by_grams,
    diagonal_dominance,
    erc_loss,
    row_noise,
)
from moestro.models.layouts import LAYOUTS
from moestro.models.routers import routers
from moestro.models.routing import RoutingRecord
from moestro.models.weights import StoredWeights
from moestro.training.auxiliary import MicroBatch
from moestro.training.routing_losses import Routing
from moestro.training.routing_losses.erc import ExpertRouterCoupling
from moestro.tuning import tune

pytestmark = pytest.mark.usefixtures("one_thread")

ORIGINS = [["code", "math", "seed", "code", "math", "seed"]] * 2
ROUTING = Routing(
    RoutingRecord(), MicroBatch(torch.zeros(1, 2), torch.zeros(1), torch.zeros(1, 1, 1), torch.zeros(1)), [], []
)


def drawn(rows: int = 4, hidden: int = 16, width: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows_ND = torch.randn(rows, hidden, generator=generator, dtype=torch.float64)
    return rows_ND, torch.randn(rows, width, hidden, generator=generator, dtype=torch.float64)


def test_m_is_the_norm_of_what_expert_j_makes_of_row_i() -> None:
    rows_ND, gates_NFD = drawn()
    norms_NN = activation_norms(rows_ND, gates_NFD)
    for i in range(4):
        for j in range(4):
            assert float(norms_NN[i, j]) == pytest.approx(float((gates_NFD[j] @ rows_ND[i]).norm()))
    torch.testing.assert_close(activation_norms_by_grams(rows_ND, gates_NFD.mT @ gates_NFD), norms_NN)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_experts_on_blocks_of_their_own_cost_nothing(alpha: float) -> None:
    """Each row lies in the block that its expert alone reads, noise or no noise."""
    rows_ND, gates_NFD = drawn()
    blocks_ND = torch.eye(4, dtype=torch.float64).repeat_interleave(4, dim=1)
    rows_ND, gates_NFD = rows_ND * blocks_ND, gates_NFD * blocks_ND[:, None]
    noisy_ND = rows_ND * (1 + row_noise(rows_ND, torch.Generator().manual_seed(1)))
    for some_ND in (rows_ND, noisy_ND):
        norms_NN = activation_norms(some_ND, gates_NFD)
        assert float(erc_loss(norms_NN, alpha)) < 1e-18
        assert diagonal_dominance(norms_NN)[0] == 1.0


def test_dominance_of_a_matrix_by_hand() -> None:
    norms_NN = torch.tensor([[3.0, 1.0, 1.0], [1.0, 2.0, 2.5], [0.0, 1.0, 2.4]])
    share, margin = diagonal_dominance(norms_NN)
    assert share == pytest.approx(1 / 3)  # the third is the largest of its row, not of its column
    assert margin == pytest.approx(((3 - 1) + (2 - 2.5) + (2.4 - 2.5)) / 3 / (13.9 / 9))


def test_a_lone_expert_is_coupled_by_no_margin() -> None:
    """Figures are written as JSON, which has no infinity."""
    norms_NN = torch.tensor([[3.0]])
    assert diagonal_dominance(norms_NN) == (1.0, 0.0)
    assert float(erc_loss(norms_NN, 0.5)) == 0.0


def test_gradients_of_the_loss_to_rows_and_experts() -> None:
    rows_ND, gates_NFD = drawn(3, 5, 4)
    noise_ND = row_noise(rows_ND, torch.Generator().manual_seed(2))

    def loss(rows_ND: torch.Tensor, gates_NFD: torch.Tensor) -> torch.Tensor:
        return erc_loss(activation_norms(rows_ND * (1 + noise_ND), gates_NFD), 0.8)

    assert float(loss(rows_ND, gates_NFD)) > 0
    assert torch.autograd.gradcheck(loss, (rows_ND.requires_grad_(), gates_NFD.requires_grad_()))


def test_noise_stays_nearer_to_its_own_row_and_carries_no_gradient() -> None:
    rows_ND, _ = drawn(6)
    noise_ND = row_noise(rows_ND.requires_grad_(), torch.Generator().manual_seed(3))
    assert not noise_ND.requires_grad
    distances_NN = (rows_ND[:, None] - rows_ND).norm(dim=-1).detach()
    nearest_N = distances_NN.fill_diagonal_(float("inf")).amin(dim=1)
    reach_N = nearest_N / (2 * rows_ND.detach().norm(dim=1))
    assert (noise_ND.abs() <= reach_N[:, None]).all()
    assert (noise_ND.abs().amax(dim=1) > 0.7 * reach_N).all()
    assert ((rows_ND * noise_ND).norm(dim=1) <= nearest_N / 2).all()
    assert not row_noise(torch.zeros(3, 4), torch.Generator()).any()


def test_rows_of_zero_have_finite_gradients() -> None:
    rows_ND, gates_NFD = torch.zeros(3, 5, requires_grad=True), torch.randn(3, 4, 5, requires_grad=True)
    erc_loss(activation_norms(rows_ND, gates_NFD), 0.5).backward()
    assert rows_ND.grad is not None
    assert gates_NFD.grad is not None
    assert torch.isfinite(rows_ND.grad).all()
    assert torch.isfinite(gates_NFD.grad).all()


def test_the_loss_is_on_every_architectures_gate_proj(
    tiny_moe: Callable[..., PreTrainedModel], moe_kind: str, tmp_path: Path
) -> None:
    """Against the projections as a checkpoint names them; the others get no gradient."""
    model, layout = tiny_moe(moe_kind), LAYOUTS[tiny_moe(moe_kind).config.model_type]
    coupling = ExpertRouterCoupling(ErcLoss(coefficient=3.0, alpha=0.9, seed=5), model)
    loss = coupling.loss(ROUTING)
    loss.backward()
    train_bpe(["some text"], 300).save_pretrained(tmp_path / "tokenizer")
    save_model(model, tmp_path / "model", tokenizer_from=tmp_path / "tokenizer", origins=ORIGINS)
    generator, expected = torch.Generator().manual_seed(5), []
    stored = StoredWeights(tmp_path / "model")
    for layer in range(2):
        rows_ND = stored[layout.router.format(layer=layer)].read()
        if layout.fused:
            gates_NFD = stored[layout.experts["gate_up_proj"].format(layer=layer)].read()[:, :96]
        else:
            names = [layout.experts["gate_proj"].format(layer=layer, expert=expert) for expert in range(6)]
            gates_NFD = torch.stack([stored[name].read() for name in names])
        noisy_ND = rows_ND * (1 + row_noise(rows_ND, generator))
        expected.append(float(erc_loss(activation_norms(noisy_ND, gates_NFD), 0.9)))
    assert float(loss.detach()) == pytest.approx(3 * sum(expected) / 2, rel=1e-5)
    assert coupling.metrics()["erc_loss"] == pytest.approx(sum(expected) / 2, rel=1e-5)
    for name, value in model.named_parameters():
        touched = name.endswith("gate_up_proj") or any(value is router.weight for router in routers(model))
        assert (value.grad is not None) == touched, name
        if name.endswith("gate_up_proj"):
            assert value.grad[:, :96].any()
            assert not value.grad[:, 96:].any()


def test_noise_is_drawn_once_a_step_and_goes_on_where_it_was_left(tiny_moe: Callable[..., PreTrainedModel]) -> None:
    model = tiny_moe("mixtral")
    first, resumed = (ExpertRouterCoupling(ErcLoss(), model) for _ in range(2))
    values = []
    for step in range(4):
        first.begin(step, 4)
        micro = [float(first.loss(ROUTING).detach()) for _ in range(2)]
        assert micro[0] == micro[1]
        values.append(micro[0])
        if step == 1:
            state = first.state()
    assert len(set(values)) == 4
    resumed.begin(0, 4)
    resumed.restore(state)
    for step in (2, 3):
        resumed.begin(step, 4)
        assert float(resumed.loss(ROUTING).detach()) == values[step]


def job_in(folder: Path) -> Job:
    (folder / "out").mkdir(parents=True)
    (folder / "scratch").mkdir()
    return Job(out=folder / "out", scratch=folder / "scratch")


@pytest.mark.parametrize("kind", ["mixtral", "glm4_moe"])
def test_dominance_rises_when_it_is_trained_with(
    kind: str, tiny_moe: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    train_bpe(["some text"], 300).save_pretrained(tmp_path / "tokenizer")
    save_model(tiny_moe(kind), tmp_path / "model", tokenizer_from=tmp_path / "tokenizer", origins=ORIGINS)
    (tmp_path / "code").mkdir()
    np.save(tmp_path / "code/train.npy", np.random.default_rng(0).integers(0, 300, 800).astype(np.uint16))
    np.save(tmp_path / "code/train_documents.npy", np.zeros(1, dtype=np.int64))
    training = TrainingConfig(
        steps=30, batch_size=2, sequence_length=8, log_every=1, optimizer=OptimizerConfig(learning_rate=6e-3)
    )
    config = TuneConfig(training=training, losses=(ErcLoss(alpha=0.8),))
    job = job_in(tmp_path / "job")
    tokens = {"code": Artifact(tmp_path / "code", "tokens", "code")}
    tune(config, model=Artifact(tmp_path / "model", "mix", "m"), tokens=tokens, job=job)
    rows = json.loads((job.out / "history.json").read_text())["steps"]
    assert rows[0]["diagonal_dominance"] < 0.5
    assert rows[-1]["diagonal_dominance"] > 0.9
    assert rows[0]["diagonal_margin"] < 0 < rows[-1]["diagonal_margin"]
    assert rows[-1]["erc_loss"] < 0.3 * rows[0]["erc_loss"]
