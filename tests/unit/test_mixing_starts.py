"""How routers start: rows that send text to the expert made for it, from text or from weights alone."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from moestro.artifacts import Artifact, Job
from moestro.config import MixConfig, validate
from moestro.data.tokenizer import encode, load_tokenizer, train_bpe
from moestro.errors import InputError
from moestro.mixing import mix
from moestro.mixing.recipes import plan_experts
from moestro.mixing.starts import STARTS, router_weights
from moestro.mixing.starts.context import StartContext
from moestro.mixing.starts.erc import couple
from moestro.models.checkpoint import load_model, save_model
from moestro.models.coupling import activation_norms_by_grams, erc_loss
from moestro.models.routers import feed_forwards, routers
from moestro.models.weights import StoredWeights

DOMAINS = ("code", "docs", "sums")
HIDDEN, LAYERS, WIDTH, SPAN = 64, 2, 96, 80
TEXTS = {"code": "while not done: yield self", "docs": "the reader opens a chapter", "sums": "12+34=46; 50-7=43"}
PROMPTS = {
    name: {"positive": [text, text[:9]], "negative": [other for other in TEXTS.values() if other != text]}
    for name, text in TEXTS.items()
}
ROUTERS: dict[str, dict[str, Any]] = {
    "random": {},
    "centroid": {"calibration_tokens": 1024},
    "domain_embedding": {"calibration_tokens": 1024},
    "prompts": {"prompts": PROMPTS},
    "erc": {"steps": 20},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A seed that sees the words of a domain as alike, and branches with feed-forward networks of their own."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = train_bpe([*TEXTS.values()] * 4, 300)
    tokenizer.save_pretrained(root / "tokenizer")
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
    )
    for number, name in enumerate(("seed", *DOMAINS)):
        torch.manual_seed(number)
        model = AutoModelForCausalLM.from_config(config)
        if name == "seed":
            with torch.no_grad():
                for domain, text in enumerate(TEXTS.values()):
                    words = [SPAN * domain + word for word in range(SPAN)]
                    towards = slice(20 * domain, 20 * domain + 20)
                    model.get_input_embeddings().weight[words, towards] += 0.3
                    model.get_input_embeddings().weight[ids_of(tokenizer, text), towards] += 0.6
        save_model(model, root / name, tokenizer_from=root / "tokenizer")
    return {name: root / name for name in ("seed", *DOMAINS)}


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return encode(tokenizer, [text])[0]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokens")
    for number, name in enumerate(DOMAINS):
        (root / name).mkdir()
        ids = np.random.default_rng(number).integers(SPAN * number, SPAN * (number + 1), 4000).astype(np.uint16)
        np.save(root / name / "train.npy", ids)
        np.save(root / name / "train_documents.npy", np.zeros(1, dtype=np.int64))
    return {name: root / name for name in DOMAINS}


def config_of(kind: str, *, router: Mapping[str, Any] | None = None, **fields: Any) -> MixConfig:
    router = {"type": kind} | ROUTERS.get(kind, {}) | dict(router or {})
    return validate(MixConfig, {"router": router, **fields}, where="test")


def context_of(config: MixConfig, models: Mapping[str, Path], tokens: Mapping[str, Path]) -> StartContext:
    return StartContext(
        plan=plan_experts(config, dict.fromkeys((*DOMAINS, "seed"), WIDTH)),
        layers=LAYERS,
        hidden=HIDDEN,
        longest=512,
        unknown_ids=range(320, 320),
        folders=models,
        models={name: StoredWeights(folder) for name, folder in models.items()},
        tokens=tokens,
    )


def entering(seed: Path, ids: torch.Tensor) -> list[torch.Tensor]:
    """Hidden states [T, D] before each layer's feed-forward network."""
    model, found = load_model(seed), []
    for block in feed_forwards(model):
        block.register_forward_pre_hook(lambda _, args: found.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(ids)
    return found


@pytest.mark.parametrize("router", ["centroid", "domain_embedding"])
def test_text_goes_to_the_expert_of_its_domain(router: str, models: dict[str, Path], tokens: dict[str, Path]) -> None:
    config = config_of(router)
    weights_LED, figures = router_weights(config.router, context_of(config, models, tokens))
    assert figures == {}
    assert weights_LED.shape == (LAYERS, 4, HIDDEN)
    assert not weights_LED[:, 3].any()  # the generalist
    logits: list[list[torch.Tensor]] = [[] for _ in range(LAYERS)]
    for expert in range(3):
        ids = torch.randint(SPAN * expert, SPAN * (expert + 1), (4, 64), generator=torch.Generator().manual_seed(7))
        for layer, x_TD in enumerate(entering(models["seed"], ids)):
            logits[layer].append(x_TD @ weights_LED[layer].T)
            assert (logits[layer][-1].argmax(dim=1) == expert).float().mean() > 0.8, (layer, expert)
    for layer in range(LAYERS):
        assert 0.7 < torch.cat(logits[layer])[:, :3].std() < 1.4


def test_spread_scales_the_rows_of_centroids(models: dict[str, Path], tokens: dict[str, Path]) -> None:
    configs = [config_of("centroid", router={"type": "centroid", "spread": spread}) for spread in (1.0, 3.0)]
    one, three = (router_weights(config.router, context_of(config, models, tokens))[0] for config in configs)
    assert one.abs().max() > 0
    torch.testing.assert_close(three, 3 * one)


def test_embeddings_are_the_seeds_last_hidden_states(models: dict[str, Path], tokens: dict[str, Path]) -> None:
    config = config_of("domain_embedding", router={"calibration_tokens": 256})
    context = context_of(config, models, tokens)
    weights_LED, _ = router_weights(config.router, context)
    seed = load_model(models["seed"])
    with torch.no_grad():
        embeddings = [
            seed.model(windows_NS).last_hidden_state[0].double().mean(0)
            for windows_NS in context.windows(256)[0].values()
        ]
    centred_ND = torch.stack(embeddings) - torch.stack(embeddings).mean(0)
    for layer in range(LAYERS):
        seen = [entering(models["seed"], ids)[layer].double() for ids in context.windows(256)[0].values()]
        common_D = torch.stack([x_TD.mean(0) for x_TD in seen]).mean(0)
        for expert, row_D in enumerate(weights_LED[layer, :3].double()):
            assert abs(float(row_D @ common_D)) < 1e-5 * float(row_D.norm() * common_D.norm())
            expected_D = centred_ND[expert] - common_D * (common_D @ centred_ND[expert]) / (common_D @ common_D)
            assert torch.cosine_similarity(row_D, expected_D, dim=0) > 1 - 1e-6


def test_prompts_are_rows_of_length_one(models: dict[str, Path]) -> None:
    given = {"sums": PROMPTS["sums"], "seed": {"positive": [TEXTS["docs"]]}}
    config = config_of("prompts", router={"prompts": given})
    weights_LED, _ = router_weights(config.router, context_of(config, models, {}))
    assert not weights_LED[:, :2].any()  # code and docs have no prompts
    torch.testing.assert_close(weights_LED[:, 2:].norm(dim=2), torch.ones(LAYERS, 2))
    tokenizer = load_tokenizer(models["seed"])

    def states(text: str, layer: int) -> torch.Tensor:
        return entering(models["seed"], torch.tensor([ids_of(tokenizer, text)]))[layer]

    for layer in range(LAYERS):
        positive_D = torch.cat([states(text, layer) for text in PROMPTS["sums"]["positive"]]).mean(0)
        negative_D = torch.cat([states(text, layer) for text in PROMPTS["sums"]["negative"]]).mean(0)
        row_D = (positive_D - negative_D) / (positive_D - negative_D).norm()
        torch.testing.assert_close(weights_LED[layer, 2], row_D, atol=1e-5, rtol=0)
        docs_D = states(TEXTS["docs"], layer).mean(0)
        torch.testing.assert_close(weights_LED[layer, 3], docs_D / docs_D.norm(), atol=1e-5, rtol=0)


def test_prompts_send_text_like_them_to_their_expert(models: dict[str, Path]) -> None:
    config = config_of("prompts")
    weights_LED, _ = router_weights(config.router, context_of(config, models, {}))
    tokenizer = load_tokenizer(models["seed"])
    for expert, text in enumerate(TEXTS.values()):
        for layer, x_TD in enumerate(entering(models["seed"], torch.tensor([ids_of(tokenizer, text)]))):
            assert ((x_TD @ weights_LED[layer].T).argmax(dim=1) == expert).float().mean() > 0.7


def test_prompts_that_cannot_be_used_are_named(models: dict[str, Path], tmp_path: Path) -> None:
    def mistake(prompts: dict[str, Any]) -> str:
        config = config_of("prompts", router={"prompts": prompts})
        context = replace(context_of(config_of("zero"), models, {}), folders=models | {"code": tmp_path})
        with pytest.raises(InputError) as raised:
            router_weights(config.router, context)
        return str(raised.value)

    unknown = mistake({"law": {"positive": ["an article"]}, "code": {"positive": ["x = 1"]}})
    assert "no expert is made from law." in unknown
    assert "code, docs, sums, seed" in unknown
    assert "router.prompts.code: '' has 0 tokens" in mistake({"code": {"positive": ["x = 1"], "negative": [""]}})
    assert "tokens. Give prompts of 1 to 512" in mistake({"code": {"positive": ["x=1;" * 500]}})


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
def test_erc_rows_excite_their_own_expert_most(alpha: float, models: dict[str, Path]) -> None:
    config = config_of("erc", router={"alpha": alpha, "steps": 100, "std": 0.05})
    context = context_of(config, models, {})
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


def test_erc_has_nothing_to_couple_where_experts_are_alike(models: dict[str, Path]) -> None:
    config = config_of("erc", router={"alpha": 0.5})
    context = context_of(config, dict.fromkeys(models, models["code"]), {})
    weights_LED, figures = router_weights(config.router, context)
    torch.testing.assert_close(weights_LED.square().mean(dim=2).sqrt(), torch.full((LAYERS, 4), 0.02))
    assert all(np.isfinite(value) for value in figures["erc_loss"].values())


def test_erc_couples_copies_of_the_seed_that_were_partly_drawn_anew(models: dict[str, Path]) -> None:
    config = config_of("erc", experts={"type": "drop_upcycling", "num_experts": 3})
    context = context_of(config, {"seed": models["seed"]}, {})
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


def test_zero_and_random(models: dict[str, Path]) -> None:
    config = config_of("zero")
    context = context_of(config, models, {})
    assert not router_weights(config.router, context)[0].any()
    drawn = {
        name: router_weights(config_of("random", router=fields).router, context)[0]
        for name, fields in {"first": {}, "wide": {"std": 0.2}, "other": {"seed": 1}}.items()
    }
    assert 0.015 < drawn["first"].std() < 0.025
    torch.testing.assert_close(drawn["wide"], drawn["first"] * 10)
    assert not torch.equal(drawn["first"], drawn["other"])


@pytest.mark.parametrize("router", ROUTERS)
def test_slices_that_are_chosen_together_share_their_row(
    router: str, models: dict[str, Path], tokens: dict[str, Path]
) -> None:
    config = config_of(router, experts={"type": "fine_grained", "granularity": 3})
    context = context_of(config, models, tokens)
    weights_LED, _ = router_weights(config.router, context)
    assert weights_LED.shape[1] == 12
    rows = {name: weights_LED[:, context.plan.rows.index(name)] for name in context.plan.rows}
    assert list(rows) == [*DOMAINS, "seed"]
    for expert, name in enumerate(context.plan.rows):
        assert torch.equal(weights_LED[:, expert], rows[name])
    own = [rows[name] for name in DOMAINS]
    assert all(row.any() for row in own)
    assert not torch.equal(own[0], own[1])


@pytest.mark.parametrize("router", ROUTERS)
def test_slices_with_rows_of_their_own(router: str, models: dict[str, Path], tokens: dict[str, Path]) -> None:
    config = config_of(router, experts={"type": "divmoe", "slices": 2})
    context = context_of(config, models, tokens)
    weights_LED, _ = router_weights(config.router, context)
    assert context.plan.rows[:2] == ("code/0", "code/1")
    assert weights_LED[:, 0].any()
    alike = torch.equal(weights_LED[:, 0], weights_LED[:, 1])
    assert alike == (router in {"centroid", "domain_embedding", "prompts"})


@pytest.mark.parametrize("router", ROUTERS)
def test_starting_again_gives_the_same_rows(router: str, models: dict[str, Path], tokens: dict[str, Path]) -> None:
    config = config_of(router)
    context = context_of(config, models, tokens)
    first, figures = router_weights(config.router, context)
    torch.manual_seed(99)
    again, same = router_weights(config.router, context)
    assert torch.equal(first, again)
    assert figures == same


def test_every_router_of_the_config_has_a_start() -> None:
    assert set(ROUTERS) | {"zero"} == set(STARTS)
    schema = json.dumps(MixConfig.model_json_schema()["properties"]["router"])
    assert all(f'"{name}"' in schema for name in STARTS)


@pytest.mark.parametrize("router", ["centroid", "domain_embedding"])
def test_missing_tokens_are_named_before_anything_is_read(
    router: str, models: dict[str, Path], tokens: dict[str, Path], tmp_path: Path
) -> None:
    config = config_of(router)
    context = context_of(config, models, {"docs": tokens["docs"]})
    nothing = replace(context, folders={"seed": tmp_path / "nowhere"})
    with pytest.raises(InputError, match=r"No tokens of code, sums .* zero, random, prompts or erc"):
        router_weights(config.router, nothing)


def test_figures_stand_in_the_stages_result_and_rows_in_the_checkpoint(models: dict[str, Path], tmp_path: Path) -> None:
    config = config_of("erc", num_experts_per_tok=1)
    branches = {name: Artifact(models[name], "branch", name) for name in DOMAINS}
    (tmp_path / "out").mkdir()
    result = mix(
        config,
        seed=Artifact(models["seed"], "seed", "seed"),
        branches=branches,
        tokens={},
        job=Job(out=tmp_path / "out", scratch=tmp_path),
    )
    weights_LED, figures = router_weights(config.router, context_of(config, models, {}))
    assert result["erc_loss"] == figures["erc_loss"]
    for layer, router in enumerate(routers(load_model(tmp_path / "out"))):
        assert torch.equal(router.weight.data, weights_LED[layer])
