"""How routers start: rows that send text to the expert made for it, and what all starts have in common."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from moestro.config import MixConfig, validate
from moestro.data.tokenizer import encode, load_tokenizer, train_bpe
from moestro.errors import InputError
from moestro.mixing.starts import STARTS, router_weights
from moestro.mixing.starts.context import StartContext
from moestro.models.checkpoint import load_model, save_model
from moestro.models.routers import feed_forwards

Make = Callable[..., StartContext]
DOMAINS = ("code", "docs", "sums")
HIDDEN, LAYERS, SPAN = 64, 2, 80
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
def models(tmp_path_factory: pytest.TempPathFactory, dense_fields: dict[str, Any]) -> dict[str, Path]:
    """A seed that sees the words of a domain as alike, and branches with feed-forward networks of their own."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = train_bpe([*TEXTS.values()] * 4, 300)
    tokenizer.save_pretrained(root / "tokenizer")
    own = {"max_position_embeddings": 512, "initializer_range": 0.1, "pad_token_id": None}
    config = LlamaConfig(**dense_fields | own)
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


def entering(seed: Path, ids: torch.Tensor) -> list[torch.Tensor]:
    """Hidden states [T, D] before each layer's feed-forward network."""
    model, found = load_model(seed), []
    for block in feed_forwards(model):
        block.register_forward_pre_hook(lambda _, args: found.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(ids)
    return found


@pytest.mark.parametrize("router", ["centroid", "domain_embedding"])
def test_text_goes_to_the_expert_of_its_domain(
    router: str, models: dict[str, Path], tokens: dict[str, Path], start_context: Make
) -> None:
    config = config_of(router)
    weights_LED, figures = router_weights(config.router, start_context(config, models, tokens))
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


def test_spread_scales_the_rows_of_centroids(
    models: dict[str, Path], tokens: dict[str, Path], start_context: Make
) -> None:
    configs = [config_of("centroid", router={"type": "centroid", "spread": spread}) for spread in (1.0, 3.0)]
    one, three = (router_weights(config.router, start_context(config, models, tokens))[0] for config in configs)
    assert one.abs().max() > 0
    torch.testing.assert_close(three, 3 * one)


def test_embeddings_are_the_seeds_last_hidden_states(
    models: dict[str, Path], tokens: dict[str, Path], start_context: Make
) -> None:
    config = config_of("domain_embedding", router={"calibration_tokens": 256})
    context = start_context(config, models, tokens)
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


def test_prompts_are_rows_of_length_one(models: dict[str, Path], start_context: Make) -> None:
    given = {"sums": PROMPTS["sums"], "seed": {"positive": [TEXTS["docs"]]}}
    config = config_of("prompts", router={"prompts": given})
    weights_LED, _ = router_weights(config.router, start_context(config, models, {}))
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


def test_prompts_send_text_like_them_to_their_expert(models: dict[str, Path], start_context: Make) -> None:
    config = config_of("prompts")
    weights_LED, _ = router_weights(config.router, start_context(config, models, {}))
    tokenizer = load_tokenizer(models["seed"])
    for expert, text in enumerate(TEXTS.values()):
        for layer, x_TD in enumerate(entering(models["seed"], torch.tensor([ids_of(tokenizer, text)]))):
            assert ((x_TD @ weights_LED[layer].T).argmax(dim=1) == expert).float().mean() > 0.7


def test_prompts_that_cannot_be_used_are_named(models: dict[str, Path], start_context: Make, tmp_path: Path) -> None:
    def mistake(prompts: dict[str, Any]) -> str:
        config = config_of("prompts", router={"prompts": prompts})
        context = replace(start_context(config_of("zero"), models, {}), folders=models | {"code": tmp_path})
        with pytest.raises(InputError) as raised:
            router_weights(config.router, context)
        return str(raised.value)

    unknown = mistake({"law": {"positive": ["an article"]}, "code": {"positive": ["x = 1"]}})
    assert "no expert is made from law." in unknown
    assert "code, docs, sums, seed" in unknown
    assert "router.prompts.code: '' has 0 tokens" in mistake({"code": {"positive": ["x = 1"], "negative": [""]}})
    assert "tokens. Give prompts of 1 to 512" in mistake({"code": {"positive": ["x=1;" * 500]}})


def test_zero_and_random(models: dict[str, Path], start_context: Make) -> None:
    config = config_of("zero")
    context = start_context(config, models, {})
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
    router: str, models: dict[str, Path], tokens: dict[str, Path], start_context: Make
) -> None:
    config = config_of(router, experts={"type": "fine_grained", "granularity": 3})
    context = start_context(config, models, tokens)
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
def test_slices_with_rows_of_their_own(
    router: str, models: dict[str, Path], tokens: dict[str, Path], start_context: Make
) -> None:
    config = config_of(router, experts={"type": "divmoe", "slices": 2})
    context = start_context(config, models, tokens)
    weights_LED, _ = router_weights(config.router, context)
    assert context.plan.rows[:2] == ("code/0", "code/1")
    assert weights_LED[:, 0].any()
    alike = torch.equal(weights_LED[:, 0], weights_LED[:, 1])
    assert alike == (router in {"centroid", "domain_embedding", "prompts"})


@pytest.mark.parametrize("router", ROUTERS)
def test_starting_again_gives_the_same_rows(
    router: str, models: dict[str, Path], tokens: dict[str, Path], start_context: Make
) -> None:
    config = config_of(router)
    context = start_context(config, models, tokens)
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
    router: str, models: dict[str, Path], tokens: dict[str, Path], start_context: Make, tmp_path: Path
) -> None:
    config = config_of(router)
    context = start_context(config, models, {"docs": tokens["docs"]})
    nothing = replace(context, folders={"seed": tmp_path / "nowhere"})
    with pytest.raises(InputError, match=r"No tokens of code, sums .* zero, random, prompts or erc"):
        router_weights(config.router, nothing)
