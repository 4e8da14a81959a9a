"""What keeps branches from being mixed with their seed: every difference of all of them at once, and the ways out.

The width of the feed-forward networks may differ: narrower experts are padded. Vocabularies that only add rows are
unified on request (see `moestro.models.vocabulary`).
"""

import copy
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moestro.errors import InputError
from moestro.models.blocks import same_bytes
from moestro.models.checkpoint import load_config
from moestro.models.families import feed_forward_part
from moestro.models.files import check_folder
from moestro.models.vocabulary import VOCABULARY_WEIGHTS, Clash, Vocabulary, compare_vocabularies
from moestro.models.weights import StoredWeights

SEED = "seed"
IRRELEVANT = {
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "pad_token_id",
    "pretraining_tp",
    "transformers_version",
    "use_cache",
    "vocab_size",
}
"""Config fields that change nothing in what the model computes, and those that are judged by themselves. The result
has the seed's; so it has of fields that its class of config does not know."""
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Config fields that go with the tokenizer."""
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
"""Config fields that shapes follow from."""
DTYPE = "dtype"
KINDS = {
    "model_type": "architecture",
    DTYPE: "dtype",
    **dict.fromkeys(SIZES, "sizes"),
    **dict.fromkeys(SPECIAL_TOKENS, "special"),
}
"""Config fields whose differences have a way out of their own, see `WAYS_OUT`."""
EMBEDDING, HEAD = VOCABULARY_WEIGHTS
BUFFER = "rotary_emb.inv_freq"
SHOWN = 5
"""How many differing weights an error lists per branch."""
WAYS_OUT = {
    "files": "Copy broken checkpoints again from their source.",
    "architecture": "Only models of one architecture share attention: take branches that were trained from this seed.",
    "sizes": (
        "Layers, hidden size and heads cannot be matched: take branches of the seed's size; only intermediate_size may "
        "differ, experts are padded."
    ),
    "vocabulary": "A vocabulary that only adds rows becomes everyone's with `mix.unify_vocabulary: true`.",
    "tokenizer": "Tokens of other meaning cannot be averaged: train the branches with the seed's tokenizer.",
    "special": (
        "Special tokens are the seed's, or, with `mix.unify_vocabulary: true`, those of the model with the largest "
        "vocabulary: set that, or put the seed's value back."
    ),
    "head": (
        "transformers computes with the stored head: set tie_word_embeddings to false in all models, and store a head "
        f"in each; or, where it was never meant to differ, save that checkpoint again without {HEAD}."
    ),
    "dtype": "Save all checkpoints in one type; `mix.dtype` chooses that of the result.",
    "fields": "Retrain with the seed's settings, or, where a field was changed by hand, put the seed's value back.",
    "weights": "Weights do not fit their config.json: copy or convert those checkpoints again.",
}
"""What can be done about each kind of difference, in the order of the hint."""


@dataclass(frozen=True)
class Likeness:
    """What models of one kind have in common."""

    config: Any
    """The seed's transformers config, with the vocabulary of all."""
    vocabulary: Vocabulary


@dataclass(frozen=True)
class _Model:
    """A checkpoint: its config as it is stored and as transformers has it, and the type and shape of every weight."""

    folder: Path
    parsed: dict[str, Any]
    config: Any
    weights: Mapping[str, tuple[str, tuple[int | str, ...]]]
    second_head: bool
    """Whether its head is tied to the embedding, and another one is stored."""

    @classmethod
    def read(cls, folder: Path, seed: "_Model | None" = None) -> "_Model":
        """What is equal to the seed's is known to be valid."""
        parsed = check_folder(folder, tokenizer=True, like=seed.folder if seed else None)
        config = seed.config if seed and seed.parsed == parsed else load_config(folder, parsed)
        stored = StoredWeights(folder)
        sizes = {"F": getattr(config, "intermediate_size", None), "V": config.vocab_size}

        def shape(name: str) -> tuple[int | str, ...]:
            """Sizes that are judged by themselves as letters, where they are what the config says."""
            letter = "F" if feed_forward_part(name) else "V" if name in VOCABULARY_WEIGHTS else ""
            axis = 1 if name.endswith(".down_proj.weight") else 0
            found: list[int | str] = list(stored[name].shape)
            if letter and found[axis] == sizes[letter]:
                found[axis] = letter
            return tuple(found)

        tied = config.tie_word_embeddings and HEAD in stored
        names = [name for name in stored if not (tied and name == HEAD) and not name.endswith(BUFFER)]
        weights = {name: (stored[name].code, shape(name)) for name in names}
        return cls(folder, parsed, config, weights, tied and not same_bytes(stored[HEAD], stored[EMBEDDING]))


def check_same_kind(
    seed: Path, branches: Mapping[str, Path], *, unify_vocabulary: bool = False, any_dtype: bool = False
) -> Likeness:
    """What seed and branches have in common, once it is known that they can be mixed.

    `any_dtype`: weights may be stored in another type than the seed's, as those that are converted may.
    Raises one `InputError` that lists all differences of all branches, and what could be done about each kind.
    """
    skipped = IRRELEVANT | (set(SPECIAL_TOKENS) if unify_vocabulary else set()) | ({DTYPE} if any_dtype else set())
    found = _Differences(skipped)
    models = {SEED: _Model.read(seed)}
    for name, folder in branches.items():
        try:
            models[name] = _Model.read(folder, models[SEED])
        except InputError as error:
            found.add("files", name, str(error).removesuffix("."))
    for name, model in models.items():
        found.compare(name, model, models[SEED])
    folders = {name: branches.get(name, seed) for name in models}
    rows = {name: model.config.vocab_size for name, model in models.items()}
    vocabulary, clashes = compare_vocabularies(folders, rows, base=SEED)
    found.vocabularies(vocabulary, clashes, unify=unify_vocabulary)
    found.refuse()
    config = copy.deepcopy(models[SEED].config)
    if unify_vocabulary:
        config.vocab_size = vocabulary.size
        for field in SPECIAL_TOKENS:
            setattr(config, field, getattr(models[vocabulary.largest].config, field, None))
    return Likeness(config, vocabulary)


class _Differences:
    """Lines of an error, and the kinds of differences that they are."""

    def __init__(self, skipped: Set[str]) -> None:
        """`skipped` are fields of configs that may differ; without a `dtype` weights' types may."""
        self._skipped = skipped
        self._lines: list[str] = []
        self._kinds: set[str] = set()

    def add(self, kind: str, name: str, line: str) -> None:
        self._lines.append(f"{name}: {line}")
        self._kinds.add(kind)

    def compare(self, name: str, model: _Model, seed: _Model) -> None:
        """Everything but the vocabulary."""
        if model.second_head:
            self.add("head", name, f"tie_word_embeddings is true, and it has a second head: {HEAD} is not {EMBEDDING}")
        theirs, ours = model.config.to_dict(), seed.config.to_dict()
        foreign = theirs["model_type"] != ours["model_type"]
        both = theirs.keys() & ours.keys()
        if not foreign:
            both = (theirs.keys() | ours.keys()) & type(seed.config)().to_dict().keys()
        skipped = self._skipped
        if None in (theirs.get(DTYPE), ours.get(DTYPE)):  # the weights' own types are compared anyway
            skipped = skipped | {DTYPE}
        fields = [field for field in sorted(both - skipped) if theirs.get(field) != ours.get(field)]
        for field in fields:
            self.add(
                KINDS.get(field, "fields"), name, f"{field} is {theirs.get(field)!r}, the seed's is {ours.get(field)!r}"
            )
        if not fields:
            self._weights(name, model, seed)

    def _weights(self, name: str, model: _Model, seed: _Model) -> None:
        """Weights, where the configs agree; otherwise their differences follow from those of the configs."""

        def shown(weight: tuple[str, tuple[int | str, ...]] | None) -> str:
            return f"{weight[0]} [{', '.join(map(str, weight[1]))}]" if weight else "missing"

        both = sorted(model.weights.keys() | seed.weights.keys())
        part = slice(1, None) if DTYPE in self._skipped else slice(None)
        absent: tuple[Any, ...] = ()
        unlike = [
            weight
            for weight in both
            if model.weights.get(weight, absent)[part] != seed.weights.get(weight, absent)[part]
        ]
        for weight in unlike[:SHOWN]:
            theirs, ours = shown(model.weights.get(weight)), shown(seed.weights.get(weight))
            self.add("weights", name, f"{weight} is {theirs}, the seed's is {ours}")
        if len(unlike) > SHOWN:
            self.add("weights", name, f"{len(unlike) - SHOWN} more weights")

    def vocabularies(self, vocabulary: Vocabulary, clashes: Sequence[Clash], *, unify: bool) -> None:
        """Tokenizers that do not go together and, unless they are unified, sizes that differ from the seed's."""
        for clash in clashes:
            whose = "the seed's" if clash.other == SEED else f"that of {clash.other}"
            self.add("tokenizer", clash.name, f"its tokenizer does not go with {whose} ({'; '.join(clash.reasons)})")
        ours = f"the seed's is {vocabulary.rows[SEED]} for one of {vocabulary.tokens[SEED]}"
        for name, rows in vocabulary.rows.items():
            sizes = (rows, vocabulary.tokens[name])
            if sizes != (vocabulary.rows[SEED], vocabulary.tokens[SEED]) and not unify:
                kind = "tokenizer" if name in {clash.name for clash in clashes} else "vocabulary"
                self.add(kind, name, f"vocab_size is {sizes[0]} for a tokenizer of {sizes[1]} ids, {ours}")

    def refuse(self) -> None:
        if self._lines:
            raise InputError(
                "Seed and branches cannot be mixed as they are. " + "; ".join(self._lines) + ".",
                hint=" ".join(way for kind, way in WAYS_OUT.items() if kind in self._kinds),
            )
