"""The steer stage: which experts it finds, what it refuses, and its gate."""

from pathlib import Path

import numpy as np
import pytest
import torch

from moestro.artifacts import Artifact, Job
from moestro.config import AnyProfile, Config, DomainContrast, validate
from moestro.data.tokenizer import train_bpe
from moestro.errors import ConfigError, GateError, InputError
from moestro.models.checkpoint import load_model, save_model
from moestro.models.routing import record_routes
from moestro.models.steering_profiles import Profile
from moestro.steering import steer
from moestro.steering.reference import SERVED, check_steerable, greedy, steered, steered_logits
from moestro.steering.selection import activations, largest

TEXTS = {"code": "for i in range(10): print(i * 2)\n" * 60, "prose": "it was a dark night and the rain fell\n" * 60}
GATE = {"sequence_length": 32, "max_tokens": 256, "max_loss_increase": 5.0}


@pytest.fixture(scope="module")
def world(tiny_moe, tmp_path_factory):
    """A Mixtral whose experts are random, and the tokens of two domains."""
    folder = tmp_path_factory.mktemp("steering")
    tokenizer = train_bpe(TEXTS.values(), 300)
    tokenizer.save_pretrained(folder / "tokenizer")
    save_model(tiny_moe("mixtral"), folder / "model", tokenizer_from=folder / "tokenizer", origins=[["seed"] * 6] * 2)
    tokens = {}
    for name, text in TEXTS.items():
        (folder / name).mkdir()
        ids = np.array(tokenizer(text)["input_ids"], np.uint16)
        for split in ("train", "held_out"):
            np.save(folder / name / f"{split}.npy", ids)
            np.save(folder / name / f"{split}_documents.npy", np.zeros(1, np.int64))
        tokens[name] = Artifact(folder / name, "tokens", name)
    return Artifact(folder / "model", "rl", "c" * 64), tokens


def config(**fields) -> Config:
    return validate(AnyProfile, {"name": "p", "gate": GATE} | fields, where="test")


def made(world, tmp_path: Path, **fields):
    model, tokens = world
    (tmp_path / "out").mkdir()
    job = Job(out=tmp_path / "out", scratch=tmp_path)
    result = steer(config(**fields), model=model, tokens=tokens, job=job)
    return result, Profile.read(tmp_path / "out")


def test_named_experts_become_a_profile_with_its_figures(world, tmp_path):
    result, profile = made(world, tmp_path, method="suppress", experts={1: [4, 2, 2]})
    assert result["experts"] == {"1": [2, 4]}
    assert profile.layers == ((), (2, 4))
    assert (profile.checkpoint.stage, profile.checkpoint.fingerprint) == ("rl", "c" * 64)
    assert (profile.num_experts, profile.top_k, profile.renormalises) == (6, 2, True)
    figures = profile.gate["figures"]
    assert set(figures) == {"code", "prose"}
    for found in figures.values():
        assert found["loss_increase"] == pytest.approx(found["steered_loss"] - found["loss"], abs=2e-6)
        assert found["loss_increase"] != 0
    assert profile.gate["thresholds"]["max_loss_increase"] == 5.0


def rates(world, domain: str) -> torch.Tensor:
    """Counted token by token."""
    model = load_model(world[0].path)
    ids = np.load(world[1][domain].path / "train.npy")
    windows = torch.from_numpy(ids[: len(ids) // 32 * 32].astype(np.int64)).view(-1, 32)
    counts = torch.zeros(2, 6, dtype=torch.float64)
    for window in windows:
        with torch.no_grad(), record_routes(model) as record:
            model(input_ids=window[None])
        for layer, chosen in enumerate(record.ids):
            for expert in chosen.flatten().tolist():
                counts[layer, expert] += 1
    assert torch.allclose(activations(model, windows), counts / windows.numel())
    return counts / windows.numel()


def test_experts_are_selected_by_contrast_between_domains(world, tmp_path):
    delta = rates(world, "code") - rates(world, "prose")
    select = {"type": "domains", "target": ["code"], "count": 3, "sequence_length": 32}
    _, profile = made(world, tmp_path, method="suppress", select=select)
    order = sorted((float(delta[layer, expert]), layer, expert) for layer in range(2) for expert in range(6))[::-1]
    expected = sorted((layer, expert) for _, layer, expert in order[:3])
    assert [(layer, expert) for layer, named in enumerate(profile.layers) for expert in named] == expected


def test_boost_selects_no_more_per_layer_than_a_token_chooses():
    delta = torch.tensor([[0.5, 0.4, 0.3, 0.2], [0.1, -0.1, 0.05, 0.0]])
    selection = DomainContrast(target=("code",), count=5)
    assert largest(delta, selection, most_per_layer=4) == ((0, 1, 2, 3), (0,))
    assert largest(delta, selection, most_per_layer=2) == ((0, 1), (0, 2))
    with pytest.raises(InputError, match="more often"):
        largest(-delta.abs(), selection, most_per_layer=2)


def test_experts_are_selected_by_contrast_between_prompts(world, tmp_path):
    select = {
        "type": "prompts",
        "target": ["for i in range", "print(i)"],
        "against": ["it was a dark night"],
        "count": 2,
    }
    result, profile = made(world, tmp_path, method="boost", select=select)
    assert sum(len(named) for named in profile.layers) == 2
    assert profile.parameters == {"margin": 0.01}
    assert result["method"] == "boost"


def test_language_takes_the_experts_of_middle_layers_above_the_threshold(world, tmp_path):
    delta = rates(world, "code") - rates(world, "prose")
    threshold = float(delta[0].max()) - 1e-3
    fields = {"method": "language", "target": "code", "threshold": threshold, "sequence_length": 32}
    _, profile = made(world, tmp_path, begin=0.0, end=0.5, **fields)
    assert profile.layers == (tuple((delta[0] > threshold).nonzero()[:, 0].tolist()), ())
    (tmp_path / "again").mkdir()
    with pytest.raises(InputError, match="largest contrast is"):
        made(world, tmp_path / "again", begin=0.0, end=0.5, **fields | {"threshold": 0.99})


def test_contrast_records_what_it_rules_out(world, tmp_path):
    result, profile = made(world, tmp_path, method="contrast", weak_rank=2)
    assert profile.layers == ((), ())
    assert result["experts"] == {}
    assert all(0 <= found["ruled_out"] < 1 for found in profile.gate["figures"].values())


def test_the_gate_refuses_with_figure_and_threshold(world, tmp_path):
    experts = {layer: list(range(6)) for layer in range(2)}
    with pytest.raises(GateError, match=r"code by 0\.\d+|prose by 0\.\d+") as refused:
        made(world, tmp_path, method="suppress", experts=experts, gate=GATE | {"max_loss_increase": 0.0})
    assert "at most 0" in refused.value.message
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "suppress", "experts": {2: [0]}}, "no sparse layer 2"),
        ({"method": "suppress", "experts": {0: [6]}}, "numbered 0 to 5"),
        ({"method": "boost", "experts": {0: [0, 1, 2]}}, "more than 2"),
        ({"method": "contrast", "weak_rank": 7}, "6 ranks"),
        ({"method": "language", "target": "english"}, "no tokens of domain 'english'"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(world, tmp_path, fields, message):
    with pytest.raises(InputError, match=message):
        made(world, tmp_path, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "suppress"}, "one of the two"),
        (
            {"method": "suppress", "experts": {0: [1]}, "select": {"type": "domains", "target": ["code"]}},
            "one of the two",
        ),
        ({"method": "suppress", "experts": {-1: [1]}}, "greater than or equal to 0"),
        ({"method": "language", "target": "code", "begin": 0.5, "end": 0.5}, "below end"),
        ({"method": "language", "target": "code", "generic": ["code"]}, "is the target"),
        ({"method": "contrast", "alpha": 0}, "greater than 0"),
        ({"method": "erase"}, "erase"),
    ],
)
def test_configs_that_contradict_themselves_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        config(**fields)


def test_order_and_repetition_of_experts_are_no_identity():
    one = config(method="suppress", experts={1: [3, 1, 1], 0: [2]})
    assert one.identity() == config(method="suppress", experts={0: [2], 1: [1, 3]}).identity()


@pytest.mark.parametrize("kind", ["qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "mixtral"])
def test_every_softmax_router_is_steered_and_left_as_it_was(tiny_moe, kind):
    model = tiny_moe(kind)
    check_steerable(model)
    tokens = torch.arange(40).view(2, 20)
    before = steered_logits(model, tokens, None)
    shape = {"num_experts": 6, "top_k": 2, "renormalises": kind != "olmoe"}
    profile = Profile.model_validate(
        {"name": "p", "method": "boost", "checkpoint": {"stage": "rl", "fingerprint": "f"}}
        | {"layers": ((5, 0), ()), "parameters": {"margin": 0.01}}
        | shape
    )
    with torch.no_grad(), steered(model, profile), record_routes(model) as record:
        model(input_ids=tokens)
    assert torch.equal(record.ids[0].sort().values, torch.tensor([[0, 5]] * 40))
    assert not torch.equal(steered_logits(model, tokens, profile), before)
    assert torch.equal(steered_logits(model, tokens, None), before)
    assert len(greedy(model, [1, 2, 3], profile, max_tokens=3)) == 3


@pytest.mark.parametrize("kind", ["glm4_moe", "flex_olmo"])
def test_other_routers_are_refused(tiny_moe, kind):
    with pytest.raises(InputError, match="cannot be steered") as refused:
        check_steerable(tiny_moe(kind))
    assert all(name in refused.value.hint for name in SERVED)
