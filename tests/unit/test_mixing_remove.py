"""Removing: experts go with their router rows, all others keep every byte, and what cannot be served is refused."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moestro.artifacts import Artifact, Job
from moestro.config import RemoveConfig
from moestro.errors import InputError
from moestro.mixing import remove
from moestro.models.checkpoint import load_model, read_config, save_model
from moestro.models.files import read_origins
from moestro.models.layouts import LAYOUTS
from moestro.models.routers import experts as experts_of
from moestro.models.routers import parameter_counts, routers

Write = Callable[..., Artifact]
OWN: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {"moe_intermediate_size": 32, "head_dim": 16},
    "flex_olmo": {},
    "olmoe": {},
    "granitemoe": {},
    "glm4_moe": {"moe_intermediate_size": 32, "first_k_dense_replace": 0},
}
"""Config fields by kind."""
NAMES = ["code", "docs", "law", "seed"]


@pytest.fixture(scope="module")
def config(dense_fields: dict[str, Any]) -> Callable[..., Any]:
    """Makes the config of a kind with a number of experts."""
    usual = dense_fields | {"num_experts_per_tok": 2, "norm_topk_prob": True}

    def make(kind: str, count: int, **fields: Any) -> Any:
        return AutoConfig.for_model(kind, **usual | OWN[kind] | {LAYOUTS[kind].num_experts: count} | fields)

    return make


@pytest.fixture(scope="module")
def write_moe(config: Callable[..., Any], tokenizer: Path) -> Write:
    """Writes a model of a kind with random routers. Further arguments are fields of its config."""

    def write(folder: Path, kind: str, origins: Sequence[str] = NAMES, layers: int = 2, **fields: Any) -> Artifact:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config(kind, len(origins), **fields))
        with torch.no_grad():
            for router in routers(model):
                for weight in (*router.parameters(), *router.buffers()):
                    weight.copy_(torch.randn_like(weight) * 0.2)
        save_model(model, folder, tokenizer_from=tokenizer, origins=[list(origins)] * layers)
        return Artifact(folder, "mix", folder.name)

    return write


def run(model: Artifact, out: Path, **fields: Any) -> dict[str, Any]:
    out.mkdir()
    return remove(RemoveConfig(**fields), model=model, job=Job(out=out, scratch=out.parent))


def by_hand(model: PreTrainedModel, config: Any, kept: Sequence[Sequence[int]]) -> PreTrainedModel:
    """A model of `config` with the weights of `model`, of each layer only the experts `kept`."""
    smaller = AutoModelForCausalLM.from_config(config)
    state = dict(model.state_dict())
    names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    for router, block, numbers in zip(routers(model), experts_of(model), kept, strict=True):
        for tensor in (*router.parameters(), *router.buffers(), *block.parameters()):
            state[names[id(tensor)]] = tensor[list(numbers)].clone()
    smaller.load_state_dict(state)
    smaller.set_experts_implementation("eager")
    return smaller.eval()


@pytest.mark.parametrize("kind", OWN)
def test_the_rest_computes_what_a_model_cut_by_hand_computes(
    kind: str, config: Callable[..., Any], write_moe: Write, tmp_path: Path
) -> None:
    moe = write_moe(tmp_path / "moe", kind)
    result = run(moe, tmp_path / "out", experts=["docs"], layers={})
    full = load_model(moe.path, experts="eager")
    expected = by_hand(full, config(kind, 3), [[0, 2, 3]] * 2)
    found = load_model(tmp_path / "out", experts="eager")
    ids_BS = torch.randint(320, (2, 33), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = found(ids_BS).logits
        assert torch.equal(logits, expected(ids_BS).logits)
        assert not torch.equal(logits, full(ids_BS).logits)
    assert {name: result[name] for name in ("parameters", "active_parameters")} == parameter_counts(found)
    assert result["experts"] == read_origins(tmp_path / "out") == [["code", "law", "seed"]] * 2
    assert result["expert_ids"] == [[0, None, 1, 2]] * 2
    assert (result["removed"], result["num_experts"], result["num_experts_per_tok"]) == (["docs"], 3, 2)
    counts = {layout.num_experts for layout in LAYOUTS.values()}
    before, after = read_config(moe.path), read_config(tmp_path / "out")
    assert {key for key in before if before[key] != after[key]} <= counts
    assert sorted(before) == sorted(after)
    for path in moe.path.iterdir():
        if path.name not in {"config.json", "experts.json", "model.safetensors"}:
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("kind", ["mixtral", "granitemoe", "glm4_moe"])
def test_every_layer_may_lose_others(kind: str, write_moe: Write, tmp_path: Path) -> None:
    moe = write_moe(tmp_path / "moe", kind)
    result = run(moe, tmp_path / "out", layers={0: [3], 1: ["code"]})
    assert result["expert_ids"] == [[0, 1, 2, None], [None, 0, 1, 2]]
    assert read_origins(tmp_path / "out") == [["code", "docs", "law"], ["docs", "law", "seed"]]
    assert result["removed"] == ["layer 0: 3", "layer 1: code"]
    before, after = load_file(moe.path / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    layout, kept = LAYOUTS[kind], ([0, 1, 2], [1, 2, 3])
    for layer, old in enumerate(kept):
        router = layout.router.format(layer=layer)
        assert torch.equal(after[router], before[router][old])
        for template in layout.experts.values():
            for new, number in enumerate(old):
                names = [template.format(layer=layer, expert=expert) for expert in (new, number)]
                pair = (after[names[0]], before[names[1]])
                assert torch.equal(pair[0][new], pair[1][number]) if layout.fused else torch.equal(*pair)
        if layout.correction_bias:
            name = layout.correction_bias.format(layer=layer)
            assert torch.equal(after[name], before[name][old])
    load_model(tmp_path / "out")


def test_names_numbers_and_layers_add_up(write_moe: Write, tmp_path: Path) -> None:
    origins = ["code", "docs", "code", "seed", "law", "math"]
    moe = write_moe(tmp_path / "moe", "mixtral", origins)
    result = run(moe, tmp_path / "out", experts=["code", 5], layers={0: [3], 1: ["law"]})
    assert result["experts"] == [["docs", "law"], ["docs", "seed"]]
    assert result["expert_ids"] == [[None, 0, None, None, 1, None], [None, 0, None, 1, None, None]]


def test_the_same_bytes_every_time_and_whatever_the_shards(write_moe: Write, tmp_path: Path) -> None:
    moe = write_moe(tmp_path / "moe", "granitemoe")
    first = run(moe, tmp_path / "first", experts=[0, "docs"])
    assert first == run(moe, tmp_path / "second", experts=["docs", 0])
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name
    run(moe, tmp_path / "shards", experts=[0, 1], max_shard_bytes=100_000)
    whole, parts = load_file(tmp_path / "first" / "model.safetensors"), {}
    for path in (tmp_path / "shards").glob("*.safetensors"):
        parts |= load_file(path)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_shards_are_read(write_moe: Write, tmp_path: Path) -> None:
    moe = write_moe(tmp_path / "moe", "qwen3_moe")
    run(moe, tmp_path / "shards", experts=["docs"], max_shard_bytes=50_000)
    sharded = Artifact(tmp_path / "shards", "remove", "shards")
    run(sharded, tmp_path / "one", experts=["seed"])
    run(moe, tmp_path / "both", experts=["docs", "seed"])
    for path in (tmp_path / "both").iterdir():
        assert path.read_bytes() == (tmp_path / "one" / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"experts": ["math"]}, "no expert made from 'math'"),
        ({"experts": [4, "docs"]}, "no expert 4"),
        ({"layers": {2: [0], 0: ["math"]}}, "no layer 2, no expert made from 'math' in layer 0"),
        ({"layers": {0: [1]}}, "different numbers of experts: 3 in layer 0, 4 in layer 1"),
        ({"experts": [0, 1, 2]}, "1 of 4 experts would remain, and every token chooses 2"),
    ],
)
def test_what_cannot_be_removed_is_named(write_moe: Write, tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    moe = write_moe(tmp_path / "moe", "mixtral")
    with pytest.raises(InputError) as raised:
        run(moe, tmp_path / "out", **fields)
    assert words in raised.value.message
    assert raised.value.hint
    assert not list((tmp_path / "out").iterdir())


def test_an_expert_that_is_not_there_is_answered_with_those_that_are(write_moe: Write, tmp_path: Path) -> None:
    moe = write_moe(tmp_path / "moe", "mixtral")
    with pytest.raises(InputError) as raised:
        run(moe, tmp_path / "out", experts=["math"])
    assert raised.value.hint == "Layers 0 to 1 have experts 0 to 3, made from code, docs, law, seed."
    (moe.path / "experts.json").unlink()
    with pytest.raises(InputError, match=r"no experts\.json says what they were made from"):
        run(moe, tmp_path / "again", experts=["docs"])
    assert run(moe, tmp_path / "number", experts=[1])["num_experts"] == 3
    assert not (tmp_path / "number" / "experts.json").exists()
    (moe.path / "experts.json").write_text('{"origins": [["a", "b"]]}')
    with pytest.raises(InputError, match="belongs to another checkpoint"):
        run(moe, tmp_path / "other", experts=[1])


def test_every_group_loses_as_many(write_moe: Write, tmp_path: Path) -> None:
    grouped = {"n_group": 2, "topk_group": 1}
    names = ["a", "b", "c", "d", "e", "f"]
    moe = write_moe(tmp_path / "moe", "glm4_moe", names, **grouped)
    with pytest.raises(InputError, match=r"Groups of experts would keep different numbers \(2, 3\) in layer 0"):
        run(moe, tmp_path / "odd", experts=["a"])
    with pytest.raises(InputError, match=r"different numbers \(1, 3\)"):
        run(moe, tmp_path / "even", experts=["a", "b"])
    with pytest.raises(InputError, match="Groups would keep 1 experts"):
        run(moe, tmp_path / "few", experts=["a", "b", "d", "e"])
    assert run(moe, tmp_path / "out", experts=["a", "f"])["experts"] == [["b", "c", "d", "e"]] * 2
    load_model(tmp_path / "out")


def test_a_group_must_hold_what_a_token_chooses(write_moe: Write, tmp_path: Path) -> None:
    fields = {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 3}
    moe = write_moe(tmp_path / "moe", "glm4_moe", ["a", "b", "c", "d", "e", "f"], **fields)
    with pytest.raises(InputError, match="The 1 groups that a token chooses would hold fewer than the 3"):
        run(moe, tmp_path / "out", experts=["a", "f"])


def test_dense_layers_between_sparse_ones_stay(write_moe: Write, tmp_path: Path) -> None:
    moe = write_moe(
        tmp_path / "moe",
        "qwen3_moe",
        layers=1,
        num_hidden_layers=3,
        mlp_only_layers=[0],
        decoder_sparse_step=2,
    )
    result = run(moe, tmp_path / "out", layers={1: ["law"]})
    assert result["expert_ids"] == [[0, 1, None, 2]]
    model = load_model(tmp_path / "out")
    assert {name: result[name] for name in ("parameters", "active_parameters")} == parameter_counts(model)
    with pytest.raises(InputError, match="no layer 0"):
        run(moe, tmp_path / "none", layers={0: ["law"]})


def test_bfloat16_and_what_no_layout_knows_beside_the_experts_stay(write_moe: Write, tmp_path: Path) -> None:
    moe = write_moe(tmp_path / "moe", "mixtral")
    weights = {name: tensor.bfloat16() for name, tensor in load_file(moe.path / "model.safetensors").items()}
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8, dtype=torch.float32)
    save_file(weights, moe.path / "model.safetensors", {"format": "pt"})
    run(moe, tmp_path / "out", experts=[0])
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(after["model.layers.0.self_attn.rotary_emb.inv_freq"], torch.ones(8))
    router = LAYOUTS["mixtral"].router.format(layer=0)
    assert after[router].dtype == torch.bfloat16
    assert torch.equal(after[router], weights[router][1:])


def test_what_only_an_engine_gets_wrong_does_not_keep_experts(write_moe: Write, tmp_path: Path) -> None:
    """vLLM never renormalises OLMoE's gates: the checkpoint is as wrong there with an expert less."""
    moe = write_moe(tmp_path / "moe", "olmoe", norm_topk_prob=True)
    assert run(moe, tmp_path / "out", experts=[0])["num_experts"] == len(NAMES) - 1
    weights = load_file(moe.path / "model.safetensors")
    del weights["model.layers.1.input_layernorm.weight"]
    save_file(weights, moe.path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"wrong already \(missing-tensors"):
        run(moe, tmp_path / "broken", experts=[0])
    assert list((tmp_path / "broken").iterdir()) == []


def test_a_count_that_is_no_number_is_refused(write_moe: Write, tmp_path: Path) -> None:
    moe = write_moe(tmp_path / "moe", "mixtral")
    config = moe.path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_local_experts": "three"}))
    with pytest.raises(InputError, match="no number of experts"):
        run(moe, tmp_path / "out", experts=[0])


def test_broken_and_dense_models_are_refused(
    write_moe: Write, write_dense: Callable[..., Path], tmp_path: Path
) -> None:
    write_dense(tmp_path / "dense", 0)
    with pytest.raises(InputError, match="is a dense model"):
        run(Artifact(tmp_path / "dense", "seed", "x"), tmp_path / "a", experts=[0])
    moe = write_moe(tmp_path / "moe", "mixtral")
    cut = Artifact(Path(shutil.copytree(moe.path, tmp_path / "cut")), "mix", "cut")
    weights = cut.path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"cut/model\.safetensors"):
        run(cut, tmp_path / "b", experts=[0])


def test_a_config_names_experts() -> None:
    with pytest.raises(ValueError, match="name at least one expert"):
        RemoveConfig(layers={0: ()})
    one, other = RemoveConfig(experts=("b", 2, "a", 2)), RemoveConfig(experts=(2, "a", "b"))
    assert one.identity() == other.identity()
    assert RemoveConfig(layers={1: (2,), 0: ("a",)}).identity()["layers"] == {"0": ["a"], "1": [2]}
    for wrong in ({"experts": (-1,)}, {"experts": ("",)}, {"layers": {-1: (0,)}}):
        with pytest.raises(ValueError, match=r"experts|layers"):
            RemoveConfig(**wrong)
