"""Rules on embedding and output head.

V vocabulary.
"""

from collections.abc import Iterator

from moestro.linting.checkpoint import EMBEDDING, HEAD, Checkpoint
from moestro.linting.draft import Draft
from moestro.linting.rule import Rule, Trouble
from moestro.models.blocks import same_bytes

NEVER_TIED = {"glm4_moe", "olmoe"}
"""Architectures whose class in vLLM has an output head of its own whatever the config says."""
TIE = "tie_word_embeddings"


def _tied(checkpoint: Checkpoint) -> Iterator[Trouble]:
    tied = checkpoint.config.tie_word_embeddings
    if checkpoint.model_type in NEVER_TIED and tied and HEAD not in checkpoint.weights:
        yield Trouble(
            where=(TIE, HEAD),
            what="The output head is tied to the embedding, and not stored.",
            transformers="Uses the embedding.",
            vllm="Has a head of its own and leaves it uninitialised without a word: wrong by nats, or noise.",
            remedy=f"Store the embedding a second time as {HEAD} and set {TIE} to false.",
            affects=("vllm",),
            fixable=EMBEDDING in checkpoint.weights,
        )


def _store_head(_checkpoint: Checkpoint, draft: Draft) -> None:
    draft.config[TIE] = False
    draft.tensors[HEAD] = draft.tensors[EMBEDDING]


TIED_HEAD = Rule(
    name="tied-head",
    severity="error",
    about="A tied output head in an architecture for which vLLM does not tie it.",
    check=_tied,
    mend=_store_head,
    mends="The embedding is stored as the head as well, and nothing is tied.",
)


def _second(checkpoint: Checkpoint) -> Iterator[Trouble]:
    weights = checkpoint.weights
    stored = HEAD in weights and EMBEDDING in weights
    if checkpoint.config.tie_word_embeddings and stored and not same_bytes(weights[HEAD], weights[EMBEDDING]):
        yield Trouble(
            where=(TIE, HEAD),
            what="The output head is tied to the embedding, and one that differs from it is stored.",
            transformers="Goes by what is stored and warns; older versions go by the config.",
            vllm="Goes by what is stored; older versions go by the config.",
            remedy=f"Set {TIE} to false; or remove {HEAD} if it was never meant to differ.",
            affects=(),
            fixable=True,
        )


def _untie(_checkpoint: Checkpoint, draft: Draft) -> None:
    draft.config[TIE] = False


SECOND_HEAD = Rule(
    name="second-head",
    severity="warning",
    about="A tied output head, and another one stored.",
    check=_second,
    mend=_untie,
    mends="What transformers uses: the stored head, and nothing is tied.",
    costly=True,
)


def _no_head(checkpoint: Checkpoint) -> Iterator[Trouble]:
    if not checkpoint.config.tie_word_embeddings and HEAD not in checkpoint.weights:
        yield Trouble(
            where=(TIE, HEAD),
            what="The output head is not tied to the embedding, and none is stored.",
            transformers="Fills it with random numbers and only warns.",
            vllm="Leaves it uninitialised without a word.",
            remedy=f"Only the maker knows: set {TIE} to true if that is what the model was, else get the head.",
        )


MISSING_HEAD = Rule(
    name="missing-head",
    severity="error",
    about="An output head of its own that is not stored.",
    check=_no_head,
    structural=True,
)


def _vocabulary(checkpoint: Checkpoint) -> Iterator[Trouble]:
    told, stored = checkpoint.config.vocab_size, checkpoint.stored_sizes.get("vocab_size")
    if stored is not None and stored != told:
        yield Trouble(
            where=("vocab_size", EMBEDDING),
            what=f"vocab_size is {told}, and the embedding has {stored} rows.",
            transformers="Refuses to load it.",
            vllm="Raises an error.",
            remedy="Set vocab_size to the rows of the embedding.",
            fixable=True,
        )


def _tell_vocabulary(checkpoint: Checkpoint, draft: Draft) -> None:
    draft.config["vocab_size"] = checkpoint.stored_sizes["vocab_size"]


VOCABULARY_SIZE = Rule(
    name="vocabulary-size",
    severity="error",
    about="`vocab_size` is not the number of rows of the embedding.",
    check=_vocabulary,
    mend=_tell_vocabulary,
    mends="The number of rows.",
    structural=True,
)


def _pad(checkpoint: Checkpoint) -> Iterator[Trouble]:
    pad = checkpoint.config.pad_token_id
    vocabulary = embedding_rows(checkpoint)
    if isinstance(pad, int) and pad >= vocabulary:
        default = "" if "pad_token_id" in checkpoint.parsed else " by default"
        yield Trouble(
            where=("pad_token_id",),
            what=f"pad_token_id is {pad}{default}, and the vocabulary has {vocabulary} ids.",
            transformers="Cannot build the embedding.",
            vllm="Cannot build the embedding where it goes through transformers.",
            remedy="Set pad_token_id to the tokenizer's, or to null.",
            fixable=True,
        )


def embedding_rows(checkpoint: Checkpoint) -> int:
    """How many token ids the model has."""
    return checkpoint.stored_sizes.get("vocab_size", int(checkpoint.text.vocab_size))


def _no_pad(_checkpoint: Checkpoint, draft: Draft) -> None:
    draft.config["pad_token_id"] = None


PAD_TOKEN = Rule(
    name="pad-token",
    severity="error",
    about="`pad_token_id` lies outside the vocabulary, as FlexOlmo's default 100277 does for most models.",
    check=_pad,
    mend=_no_pad,
    mends="There is none.",
    of_quantised=True,
)
