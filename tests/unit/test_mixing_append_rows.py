"""Appending: how the new expert's router row starts, from text or from the other rows."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moestro.artifacts import Artifact
from moestro.errors import InputError
from moestro.models.checkpoint import load_model
from moestro.models.layouts import LAYOUTS
from moestro.models.routing import record_routes

Mixed = tuple[Any, Artifact, Artifact]
"""A family of checkpoints, a mix of it, and a branch that is not in the mix."""
Make = Callable[..., Any]


def artifact(folder: Path) -> Artifact:
    return Artifact(folder, "branch", folder.name)


def write_tokens(folder: Path, ids: np.ndarray) -> Artifact:
    folder.mkdir()
    np.save(folder / "train.npy", ids.astype(np.uint16))
    np.save(folder / "train_documents.npy", np.zeros(1, dtype=np.int64))
    return artifact(folder)


@pytest.mark.parametrize("start", ["centroid", "domain_embedding", "mean", "random", "zero"])
def test_rows_are_as_long_as_the_others_and_the_same_every_time(
    mixtral_family: Mixed, start: str, run_append: Make, tmp_path: Path
) -> None:
    _, moe, law = mixtral_family
    tokens = {
        name: write_tokens(tmp_path / name, np.random.default_rng(0).integers(low, low + 100, 3000))
        for name, low in (("law", 0), ("code", 100))
    }
    first = run_append(moe, law, tmp_path / "first", tokens, router={"type": start})
    torch.manual_seed(99)
    assert first == run_append(moe, law, tmp_path / "second", tokens, router={"type": start})
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name
    assert first["router"] == start
    for layer in range(2):
        rows_ED = load_file(tmp_path / "first" / "model.safetensors")[LAYOUTS["mixtral"].router.format(layer=layer)]
        norms_E = rows_ED.norm(dim=1)
        if start == "zero":
            assert not norms_E[3]
        else:
            torch.testing.assert_close(norms_E[3], norms_E[:3].mean())
        if start == "mean":
            assert torch.cosine_similarity(rows_ED[3], rows_ED[:3].mean(0), dim=0) > 0.9999


def test_random_rows_depend_on_the_seed_and_differ_between_layers(
    mixtral_family: Mixed, run_append: Make, tmp_path: Path
) -> None:
    _, moe, law = mixtral_family

    def rows(name: str, **fields: Any) -> list[torch.Tensor]:
        run_append(moe, law, tmp_path / name, router={"type": "random", **fields})
        weights = load_file(tmp_path / name / "model.safetensors")
        return [weights[LAYOUTS["mixtral"].router.format(layer=layer)][3] for layer in range(2)]

    first, other = rows("first"), rows("other", seed=1)
    assert not torch.equal(first[0], other[0])
    assert torch.cosine_similarity(first[0], first[1], dim=0).abs() < 0.5


@pytest.mark.parametrize("start", ["centroid", "domain_embedding"])
def test_rows_from_text_send_the_domain_to_its_expert_and_others_elsewhere(
    mixed_family: Mixed, start: str, run_append: Make, tmp_path: Path
) -> None:
    """Words of a domain are alike; the router's other rows know nothing of it."""
    _, moe, law = mixed_family
    base = artifact(Path(shutil.copytree(moe.path, tmp_path / "base")))
    weights = load_file(base.path / "model.safetensors")
    for domain in range(3):
        weights["model.embed_tokens.weight"][100 * domain : 100 * (domain + 1), 20 * domain : 20 * domain + 20] += 1.0
    save_file(weights, base.path / "model.safetensors", {"format": "pt"})
    generator = np.random.default_rng(3)
    tokens = {
        name: write_tokens(tmp_path / name, generator.integers(100 * number, 100 * (number + 1), 3000))
        for number, name in enumerate(("law", "code", "docs"))
    }
    run_append(base, law, tmp_path / "out", tokens, router={"type": start, "calibration_tokens": 2048})
    model = load_model(tmp_path / "out")
    shares = []
    for number in range(3):
        ids = torch.randint(100 * number, 100 * (number + 1), (4, 64), generator=torch.Generator().manual_seed(7))
        with record_routes(model) as record, torch.no_grad():
            model(ids)
        shares.append([float((ids_TK == 3).any(dim=1).float().mean()) for ids_TK in record.ids])
    assert min(shares[0]) > 0.6
    assert max(shares[1] + shares[2]) < 0.3


@pytest.mark.parametrize("start", ["centroid", "domain_embedding"])
def test_a_row_from_text_needs_another_domain(
    mixtral_family: Mixed, start: str, run_append: Make, tmp_path: Path
) -> None:
    _, moe, law = mixtral_family
    tokens = {"law": write_tokens(tmp_path / "law", np.arange(300))}
    with pytest.raises(InputError, match="Only tokens of law itself") as raised:
        run_append(moe, law, tmp_path / "out", tokens, router={"type": start})
    assert "another domain's tokens" in raised.value.hint


def test_a_row_from_text_needs_the_domains_tokens(mixtral_family: Mixed, run_append: Make, tmp_path: Path) -> None:
    _, moe, law = mixtral_family
    tokens = {"code": write_tokens(tmp_path / "code", np.arange(300))}
    with pytest.raises(InputError, match="No tokens of law to start its router row from"):
        run_append(moe, law, tmp_path / "out", tokens, router={"type": "centroid"})


def test_rows_of_zeros_say_nothing_of_how_long_a_row_is(
    mixtral_family: Mixed, run_append: Make, tmp_path: Path
) -> None:
    _, moe, law = mixtral_family
    names = [LAYOUTS["mixtral"].router.format(layer=layer) for layer in range(2)]

    def with_rows(folder: str, zero: slice) -> Artifact:
        base = artifact(Path(shutil.copytree(moe.path, tmp_path / folder)))
        weights = load_file(base.path / "model.safetensors")
        weights[names[1]][zero] = 0.0
        save_file(weights, base.path / "model.safetensors", {"format": "pt"})
        return base

    run_append(with_rows("generalist", slice(2, 3)), law, tmp_path / "out", router={"type": "random"})
    rows_ED = load_file(tmp_path / "out" / "model.safetensors")[names[1]]
    torch.testing.assert_close(rows_ED[3].norm(), rows_ED[:2].norm(dim=1).mean())
    nothing = with_rows("nothing", slice(0, 3))
    with pytest.raises(InputError, match="All router rows of layer 1 are zero"):
        run_append(nothing, law, tmp_path / "refused", router={"type": "random"})
    for start in ("zero", "mean"):
        run_append(nothing, law, tmp_path / start, router={"type": start})
        assert not load_file(tmp_path / start / "model.safetensors")[names[1]].any()
