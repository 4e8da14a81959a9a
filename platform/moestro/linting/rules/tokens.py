"""Rules on tokenizer and special tokens."""

from collections.abc import Iterator
from typing import Any

from moestro.linting.checkpoint import Checkpoint, refused
from moestro.linting.rule import Rule, Trouble
from moestro.linting.rules.embeddings import embedding_rows
from moestro.models.files import CONFIG, GENERATION_CONFIG


def _tokenizer(checkpoint: Checkpoint) -> Iterator[Trouble]:
    error = refused(lambda: checkpoint.tokenizer)
    if error or checkpoint.tokenizer is None:
        yield Trouble(
            where=("tokenizer.json",),
            what=error.message if error else "There is no tokenizer.",
            transformers="Loads the model; text cannot be turned into tokens.",
            vllm="The server does not start.",
            remedy="Put the tokenizer's files beside the weights.",
            affects=("vllm",),
        )


MISSING_TOKENIZER = Rule(
    name="missing-tokenizer",
    severity="error",
    about="There is no tokenizer, or it cannot be read.",
    check=_tokenizer,
    costly=True,
    any_architecture=True,
    of_quantised=True,
)


def _too_large(checkpoint: Checkpoint) -> Iterator[Trouble]:
    if refused(lambda: checkpoint.tokenizer) or checkpoint.tokenizer is None:
        return
    rows, largest = embedding_rows(checkpoint), max(checkpoint.tokenizer.get_vocab().values())
    if largest >= rows:
        yield Trouble(
            where=("tokenizer.json", "vocab_size"),
            what=f"The tokenizer gives ids up to {largest}, and the embedding has {rows} rows.",
            transformers="Raises an index error, on a GPU in the midst of a kernel.",
            vllm="Refuses prompts with such ids.",
            remedy="Take the tokenizer that belongs to the model, or add rows to embedding and head.",
        )


LARGE_TOKENIZER = Rule(
    name="large-tokenizer",
    severity="error",
    about="The tokenizer gives ids for which the embedding has no row.",
    check=_too_large,
    costly=True,
    any_architecture=True,
    of_quantised=True,
)


def _ids(value: Any) -> list[int]:
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int)]


def _special(checkpoint: Checkpoint) -> Iterator[Trouble]:
    rows = embedding_rows(checkpoint)
    sources = ((CONFIG, vars(checkpoint.text)), (GENERATION_CONFIG, checkpoint.generation))
    outside = {
        f"{file}: {field}": content.get(field)
        for file, content in sources
        for field in ("bos_token_id", "eos_token_id", "pad_token_id")
        if any(not 0 <= number < rows for number in _ids(content.get(field)))
        and (file, field) != (CONFIG, "pad_token_id")
    }
    if outside:
        yield Trouble(
            where=tuple(outside),
            what=f"Special tokens lie outside the vocabulary of {rows} ids: {', '.join(map(str, outside.values()))}.",
            transformers="Never stops at them; fails where one is put in.",
            vllm="Never stops at them.",
            remedy="Set them to the tokenizer's. No repair does: which ids end a text, only the maker knows.",
        )


SPECIAL_TOKENS = Rule(
    name="special-tokens",
    severity="warning",
    about="`bos_token_id` or `eos_token_id` lies outside the vocabulary.",
    check=_special,
    any_architecture=True,
    of_quantised=True,
)


def _end(checkpoint: Checkpoint) -> Iterator[Trouble]:
    if refused(lambda: checkpoint.tokenizer) or checkpoint.tokenizer is None:
        return
    told = _ids(checkpoint.generation.get("eos_token_id")) or _ids(checkpoint.text.eos_token_id)
    own = checkpoint.tokenizer.eos_token_id
    if own not in told:
        where = GENERATION_CONFIG if checkpoint.generation.get("eos_token_id") is not None else CONFIG
        yield Trouble(
            where=(f"{where}: eos_token_id", "tokenizer_config.json: eos_token"),
            what=f"The tokenizer ends texts with {own}, generation with {told or 'nothing'}.",
            transformers=f"Stops at {told or 'no token'}.",
            vllm=f"Stops at {own} as well.",
            remedy=f"Add {own} to eos_token_id of {GENERATION_CONFIG}.",
            affects=("transformers",),
        )


END_OF_TEXT = Rule(
    name="end-of-text",
    severity="warning",
    about="The tokenizer's end of text is not where generation stops.",
    check=_end,
    costly=True,
    any_architecture=True,
    of_quantised=True,
)
