"""Configs of the domains: where their text comes from and how it is split."""

from typing import Annotated, Any, Literal

from pydantic import Field

from moestro.config.base import EXECUTION, Config
from moestro.config.seeds import Seed

DOMAIN_NAME = r"^[a-z][a-z0-9_-]{0,31}$"
"""Pattern of a domain's name."""
DomainName = Annotated[str, Field(pattern=DOMAIN_NAME)]


class TaskConfig(Config):
    """A procedural, verifiable task: a reasoning-gym generator by name with its arguments."""

    name: str
    """The generator's name in reasoning-gym, e.g. `chain_sum`."""
    arguments: dict[str, int | float | bool | str] = Field(default_factory=dict)
    """Arguments of the generator, e.g. `max_digits: 2`."""


class BuiltinSource(Config):
    """Text that every installation has."""

    type: Literal["builtin"] = "builtin"
    name: Literal["stdlib", "docs"]
    """`stdlib`: the Python standard library's sources; `docs`: English prose from the language reference
    (`pydoc_data.topics`) and the descriptions of the installed packages."""
    max_bytes: int = Field(20_000_000, ge=1_000)
    """Stop after this much text (whole documents, in a fixed shuffled order)."""


class TaskSource(Config):
    """Problems with worked answers from verifiable tasks; each problem is one document."""

    type: Literal["task"] = "task"
    tasks: tuple[TaskConfig, ...] = Field(min_length=1)
    """The tasks that are mixed, in equal shares."""
    problems: int = Field(20_000, ge=10)
    """How many distinct problems to make."""


class FileSource(Config):
    """A user's own corpus: text, JSONL or Parquet, plain or compressed (.gz, .zst), as files or globs."""

    type: Literal["files"] = "files"
    paths: Annotated[tuple[str, ...], EXECUTION] = Field(min_length=1)
    """Files or globs. A path is where the text lies, not what it is: identity is the files' contents."""
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    """`auto` decides by the file's suffix."""
    text_field: str = "text"
    """The field (JSONL) or column (Parquet) that holds a document's text."""


Source = Annotated[BuiltinSource | TaskSource | FileSource, Field(discriminator="type")]


class DomainConfig(Config):
    """One domain: a name and its text."""

    name: DomainName
    """Short lower-case name; names branches, experts and metrics."""
    source: Source
    """Where the text comes from."""
    role: Literal["expert", "general"] = "expert"
    """`expert`: a branch is trained on it and becomes an expert. `general`: text for all, without branch or expert."""


class SplitConfig(Config):
    """How a domain's documents are divided. A document's side depends on its text alone, never on its neighbours."""

    held_out_fraction: float = Field(0.05, gt=0, lt=0.5)
    """Share of the documents that is held out, chosen by the hash of a document's text."""
    min_documents: int = Field(20, ge=2)
    """A domain with fewer documents is refused."""
    seed: Seed = 0
    """Seeds the order of documents and the generated problems."""


class CorpusConfig(Config):
    """Config of the corpus stage: one domain, collected and split."""

    domain: DomainConfig
    """The domain."""
    split: SplitConfig = SplitConfig()
    """How it is divided."""

    def identity(self) -> dict[str, Any]:
        """All but the domain's role, which changes nothing in its text."""
        dumped = super().identity()
        del dumped["domain"]["role"]
        return dumped


class DataConfig(Config):
    """The corpora of a lifecycle."""

    domains: tuple[DomainConfig, ...] = Field(min_length=1)
    """The domains. Their order means nothing: experts stand in the order of the domains' names."""
    split: SplitConfig = SplitConfig()
    """How each is divided into training and held-out documents."""

    def corpus_configs(self) -> dict[str, CorpusConfig]:
        """Each domain's corpus config, in the domains' order."""
        return {domain.name: CorpusConfig(domain=domain, split=self.split) for domain in self.domains}

    def names(self, role: Literal["expert", "general"] | None = None) -> tuple[str, ...]:
        """The domains' names in order, all or those of one role."""
        return tuple(domain.name for domain in self.domains if role in (None, domain.role))


class TokensConfig(Config):
    """How text becomes token ids with a seed's tokenizer."""

    max_train_tokens: int = Field(50_000_000, ge=1_000)
    """Training tokens kept per domain (whole documents)."""
    max_held_out_tokens: int = Field(100_000, ge=256)
    """Held-out tokens kept per domain (whole documents)."""
