"""Branch-Train-Merge's ensemble against the definition, written out. M models, N windows, P predicted tokens."""

import math

import pytest
import torch

from moestro.evaluation.domain_ensembles import posterior_losses


def by_definition(losses_MP: torch.Tensor, top_k: int) -> list[float]:
    """One window, token by token, with probabilities instead of their logarithms."""
    beliefs, found = [1.0] * len(losses_MP), []
    for losses_M in losses_MP.T.tolist():
        total = sum(beliefs)
        ordered = sorted(range(len(beliefs)), key=lambda model: -beliefs[model])[:top_k]
        weight = sum(beliefs[model] for model in ordered)
        found.append(-math.log(sum(beliefs[model] / weight * math.exp(-losses_M[model]) for model in ordered)))
        beliefs = [belief / total * math.exp(-loss) for belief, loss in zip(beliefs, losses_M, strict=True)]
    return found


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_posterior_weighs_the_models(top_k: int) -> None:
    losses_MNP = 4 * torch.rand(3, 2, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = [by_definition(losses_MNP[:, window], top_k) for window in range(2)]
    torch.testing.assert_close(posterior_losses(losses_MNP, top_k), torch.tensor(expected, dtype=torch.float64))


def test_the_right_model_takes_over_and_nothing_underflows() -> None:
    losses_MNP = torch.tensor([5.0, 1.0], dtype=torch.float64).view(2, 1, 1).expand(2, 1, 2000)
    found_NP = posterior_losses(losses_MNP, 2)
    assert float(found_NP[0, 0]) == pytest.approx(-math.log((math.exp(-5) + math.exp(-1)) / 2))
    assert float(found_NP[0, -1]) == pytest.approx(1.0)
