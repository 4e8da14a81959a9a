"""Vocabularies of which one only adds rows to another's are unified on request; all others are refused in words."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from moestro.artifacts import Artifact, Job
from moestro.config import MixConfig
from moestro.data.tokenizer import load_tokenizer, train_bpe
from moestro.errors import InputError
from moestro.mixing import mix
from moestro.models.checkpoint import load_model, save_model
from moestro.models.compare import check_same_kind
from moestro.models.vocabulary import Vocabulary

TEXT = "for x in range(10): pass"
KNOWN = 272
"""Tokens of the old tokenizer."""
CHAT = ("<|user|>", "<|assistant|>")
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def write_tokenizer(folder: Path, *added: str) -> Path:
    tokenizer = train_bpe([TEXT] * 4, 300)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in added], special_tokens=True)
    tokenizer.save_pretrained(folder)
    assert len(tokenizer) == KNOWN + len(added)
    return folder


def derived(source: Path, folder: Path, tokenizer: Path, rows: int, **fields: Any) -> Path:
    """A copy of the model in `source` with another tokenizer and other rows from the first new token on."""
    shutil.copytree(source, folder)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    weights, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(rows)
    for name in (name for name in EMBEDDINGS if name in weights):
        weights[name] = torch.cat([weights[name][:KNOWN], torch.randn((rows - KNOWN, 64), generator=generator)])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder / "config.json", lambda config: config.update(vocab_size=rows, **fields))
    return folder


def edit(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module", params=["tied", "untied"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`old` and three that differ in nothing but vocabulary: `padded` has more rows, `chat` more tokens in the rows
    there were, `wide` the same tokens and more rows."""
    root = tmp_path_factory.mktemp(request.param)
    plain, chat = write_tokenizer(root / "plain"), write_tokenizer(root / "plain_chat", *CHAT)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
        eos_token_id=0,
        tie_word_embeddings=request.param == "tied",
    )
    save_model(AutoModelForCausalLM.from_config(config), root / "old", tokenizer_from=plain)
    found = {
        "old": root / "old",
        "padded": derived(root / "old", root / "padded", plain, 336),
        "chat": derived(root / "old", root / "chat", chat, 320, eos_token_id=KNOWN + 1),
        "wide": derived(root / "old", root / "wide", chat, 352),
    }
    (found["chat"] / "chat_template.jinja").write_text("chat: {{ messages[0]['content'] }}")
    (found["chat"] / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, KNOWN + 1]}))
    return found


def run(seed: Path, branches: dict[str, Path], out: Path, **fields: Any) -> dict[str, Tensor]:
    out.mkdir()
    config = {"router": {"type": "zero"}, "generalist": "none", "unify_vocabulary": True}
    mix(
        MixConfig.model_validate(config | fields),
        seed=Artifact(seed, "seed", "0"),
        branches={name: Artifact(folder, "branch", name) for name, folder in branches.items()},
        tokens={},
        job=Job(out=out, scratch=out.parent),
    )
    return load_file(out / "model.safetensors")


def outputs(folder: Path, ids_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Last hidden states, and logits of the old tokens."""
    with torch.no_grad():
        found = load_model(folder, experts="eager")(ids_BS, output_hidden_states=True)
    return found.hidden_states[-1], found.logits[..., :KNOWN]


@pytest.mark.parametrize("seed", ["old", "chat"])
def test_a_model_that_knows_the_old_tokens_alone_gives_the_same_logits_on_them(
    models: dict[str, Path], tmp_path: Path, seed: str
) -> None:
    mixed = run(models[seed], {name: models[name] for name in models if name != seed}, tmp_path / "out")
    ids_BS = torch.randint(KNOWN, (2, 17), generator=torch.Generator().manual_seed(1))
    (hidden_before, before), (hidden_after, after) = outputs(models["old"], ids_BS), outputs(tmp_path / "out", ids_BS)
    assert torch.equal(hidden_after, hidden_before)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)  # sums of a product with more rows round otherwise
    tokenizer = load_tokenizer(tmp_path / "out")
    assert len(tokenizer) == KNOWN + len(CHAT)
    assert tokenizer(CHAT[1] + TEXT)["input_ids"] == [KNOWN + 1, *load_tokenizer(models["old"])(TEXT)["input_ids"]]
    own = {name: load_file(folder / "model.safetensors") for name, folder in models.items()}
    for name in (name for name in EMBEDDINGS if name in mixed):
        rows = {model: weights[name] for model, weights in own.items()}
        assert mixed[name].shape == (352, 64)
        assert torch.equal(mixed[name][:KNOWN], rows["old"][:KNOWN])
        torch.testing.assert_close(mixed[name][272:274], (rows["chat"][272:274] + rows["wide"][272:274]) / 2)
        torch.testing.assert_close(mixed[name][274:320], sum(row[274:320] for row in rows.values()) / 4)
        torch.testing.assert_close(mixed[name][320:336], (rows["padded"][320:] + rows["wide"][320:336]) / 2)
        assert torch.equal(mixed[name][336:], rows["wide"][336:])


@pytest.mark.parametrize("seed", ["old", "chat"])
def test_companions_come_from_the_largest_tokenizer(models: dict[str, Path], tmp_path: Path, seed: str) -> None:
    other = "chat" if seed == "old" else "old"
    run(models[seed], {"one": models[other], "two": models["padded"]}, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (models["chat"] / name).read_bytes(), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"]) == (336, KNOWN + 1)


@pytest.mark.parametrize("method", ["ties", "dare", "seed"])
def test_rows_that_the_seed_lacks_are_the_mean_of_those_who_have_them(
    models: dict[str, Path], tmp_path: Path, method: str
) -> None:
    rest = {"embeddings": {"type": method}}
    mixed = run(models["old"], {"chat": models["chat"], "wide": models["wide"]}, tmp_path / "out", rest=rest)
    rows = {name: load_file(models[name] / "model.safetensors")[EMBEDDINGS[0]] for name in ("old", "chat", "wide")}
    found = mixed[EMBEDDINGS[0]]
    assert torch.equal(found[:KNOWN], rows["old"][:KNOWN])
    torch.testing.assert_close(found[272:274], (rows["chat"][272:274] + rows["wide"][272:274]) / 2)
    assert torch.equal(found[274:320], rows["old"][274:320]) == (method == "seed")
    assert torch.equal(found[320:], rows["wide"][320:])


def test_without_the_request_the_error_names_it(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        check_same_kind(models["old"], {name: models[name] for name in ("padded", "chat", "wide")})
    message = str(raised.value)
    for part in (
        "padded: vocab_size is 336 for a tokenizer of 272 ids, the seed's is 320 for one of 272",
        "chat: vocab_size is 320 for a tokenizer of 274 ids",
        "chat: eos_token_id is 273, the seed's is 0",
        "wide: vocab_size is 352 for a tokenizer of 274 ids",
        "`mix.unify_vocabulary: true`",
    ):
        assert part in message, message


def swap_two_ids(tokenizer: Any) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["f"], vocabulary["o"] = vocabulary["o"], vocabulary["f"]


def strip_around_an_added_token(tokenizer: Any) -> None:
    tokenizer["added_tokens"][0]["lstrip"] = True


def merge_other_tokens(tokenizer: Any) -> None:
    tokenizer["model"]["merges"].reverse()


def merge_into_an_old_token(tokenizer: Any) -> None:
    first, second = tokenizer["model"]["merges"][-1]
    whole = first + second
    tokenizer["model"]["merges"].append([whole[0], whole[1:]])


def split_in_another_way(tokenizer: Any) -> None:
    tokenizer["pre_tokenizer"] = None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (swap_two_ids, "2 ids have another meaning"),
        (strip_around_an_added_token, "added tokens are matched in another way"),
        (merge_other_tokens, "merges put other tokens together"),
        (merge_into_an_old_token, "merges put other tokens together"),
        (split_in_another_way, "pre_tokenizer differs"),
    ],
)
def test_a_tokenizer_that_does_more_than_add_is_refused(
    models: dict[str, Path], tmp_path: Path, change: Callable[[Any], None], named: str
) -> None:
    other = Path(shutil.copytree(models["chat"], tmp_path / "other"))
    edit(other / "tokenizer.json", change)
    for seed, branch in ((models["old"], other), (other, models["old"])):
        with pytest.raises(InputError, match=named) as raised:
            check_same_kind(seed, {"branch": branch}, unify_vocabulary=True)
        assert "branch: its tokenizer does not go with the seed's" in str(raised.value)
        assert "train the branches with the seed's tokenizer" in str(raised.value)


def test_two_branches_that_add_different_tokens_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    other = derived(models["old"], tmp_path / "other", write_tokenizer(tmp_path / "tokenizer", "<|tool|>"), 320)
    with pytest.raises(InputError, match=r"other: its tokenizer does not go with that of chat \(1 ids.*'<\|tool\|>'"):
        check_same_kind(models["old"], {"chat": models["chat"], "other": other}, unify_vocabulary=True)


def test_a_tokenizer_with_further_merges_extends_one_without(models: dict[str, Path], tmp_path: Path) -> None:
    def learn(tokenizer: Any) -> None:
        tokenizer["model"]["vocab"]["ba"] = KNOWN
        tokenizer["model"]["merges"].append(["b", "a"])

    other = Path(shutil.copytree(models["old"], tmp_path / "other"))
    edit(other / "tokenizer.json", learn)
    common = check_same_kind(models["old"], {"other": other}, unify_vocabulary=True)
    assert common.vocabulary == Vocabulary("other", {"seed": KNOWN, "other": KNOWN + 1}, {"seed": 320, "other": 320})


def test_the_same_tokenizer_in_other_words_is_the_same(models: dict[str, Path], tmp_path: Path) -> None:
    def reword(tokenizer: Any) -> None:
        tokenizer["model"]["merges"] = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
        tokenizer["padding"] = {"strategy": "BatchLongest"}

    other = Path(shutil.copytree(models["chat"], tmp_path / "other"))
    edit(other / "tokenizer.json", reword)
    assert check_same_kind(models["chat"], {"other": other}).vocabulary.largest == "seed"


def test_rows_belong_to_those_who_know_the_token_and_padding_to_those_who_have_it() -> None:
    vocabulary = Vocabulary("b", {"a": 3, "b": 5, "c": 3}, {"a": 7, "b": 6, "c": 3})
    assert vocabulary.spans() == [(0, 3, ("a", "b", "c")), (3, 5, ("b",)), (5, 6, ("a", "b")), (6, 7, ("a",))]


def test_pieces_with_scores_are_compared_by_their_order(models: dict[str, Path], tmp_path: Path) -> None:
    def as_pieces(folder: Path, *more: str, first: float = -1.0) -> Path:
        pieces = [
            [piece, first if number == 0 else -float(number)] for number, piece in enumerate(["<unk>", "a", *more])
        ]
        folder = Path(shutil.copytree(models["old"], folder))
        sections = {"added_tokens": [], "model": {"type": "Unigram", "unk_id": 0, "vocab": pieces}}
        edit(folder / "tokenizer.json", lambda tokenizer: tokenizer.update(sections))
        return folder

    seed = as_pieces(tmp_path / "seed")
    common = check_same_kind(seed, {"more": as_pieces(tmp_path / "more", "b", "c")}, unify_vocabulary=True)
    assert common.vocabulary.tokens == {"seed": 2, "more": 4}
    with pytest.raises(InputError, match="pieces have other scores"):
        check_same_kind(seed, {"more": as_pieces(tmp_path / "other", "b", first=-3.0)}, unify_vocabulary=True)


@pytest.mark.parametrize("router", ["centroid", "domain_embedding"])
def test_text_with_tokens_that_the_seed_lacks_starts_no_router(
    models: dict[str, Path], tmp_path: Path, router: str
) -> None:
    """Whether the seed has no rows for them (`wide`), or padding in their place (`chat`)."""
    ids = np.random.default_rng(0).integers(KNOWN, size=8 * 256).astype(np.uint16)
    chatting = ids.copy()
    chatting[[300, 1030, 1040]] = KNOWN + 1
    everywhere = ids.copy()
    everywhere[::256] = KNOWN + 1
    texts = {"one": ids, "two": chatting, "three": everywhere}
    tokens = {}
    for name, text in texts.items():
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "train.npy", text)
        np.save(tmp_path / name / "train_documents.npy", np.zeros(1, dtype=np.int64))
        tokens[name] = Artifact(tmp_path / name, "tokens", name)

    def started(out: str, *names: str) -> dict[str, Any]:
        (tmp_path / out).mkdir()
        config = {"router": {"type": router, "calibration_tokens": 2048}, "unify_vocabulary": True}
        branches = {name: Artifact(models["wide" if name == "one" else "chat"], "branch", name) for name in names}
        job = Job(out=tmp_path / out, scratch=tmp_path)
        seed = Artifact(models["old"], "seed", "0")
        return mix(MixConfig.model_validate(config), seed=seed, branches=branches, tokens=tokens, job=job)

    assert started("some", "one", "two")["windows_left_out"] == {"two": 2}
    load_model(tmp_path / "some")
    with pytest.raises(InputError, match="All text of three that the router is to start from") as raised:
        started("none", "one", "three")
    assert "prompts" in raised.value.hint
    (tmp_path / "one" / "train.npy").unlink()
    np.save(tmp_path / "one" / "train.npy", np.full(600, 352, dtype=np.uint16))
    with pytest.raises(InputError, match="Token id 352 is beyond"):
        started("beyond", "one", "two")
