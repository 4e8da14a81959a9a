"""How the experts of a Mixture-of-Experts that exists are changed: `AppendConfig` and `RemoveConfig`."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from moestro.config.base import Config
from moestro.config.data import DomainName
from moestro.config.seeds import Seed

RESERVED = {"seed", "blend"}
"""Names of experts that are no domain's."""
MAX_SHARD_BYTES = 5_000_000_000

ExpertName = Annotated[int, Field(ge=0)] | Annotated[str, Field(min_length=1)]


class CentroidRow(Config):
    """The domain's mean hidden state before each layer's experts, set off from those of the other domains handed in.

    It needs at least one of those.
    """

    type: Literal["centroid"] = "centroid"
    calibration_tokens: int = Field(8192, ge=256)
    """Tokens per domain that the model reads."""


class DomainEmbeddingRow(Config):
    """The domain's mean last hidden state, less that of all domains handed in, as the row in every layer (FlexOlmo).

    It needs at least two of those.
    """

    type: Literal["domain_embedding"] = "domain_embedding"
    calibration_tokens: int = Field(8192, ge=256)
    """Tokens per domain that the model reads."""


class ZeroRow(Config):
    """Zeros: the expert's logit is 0 for every token."""

    type: Literal["zero"] = "zero"


class MeanRow(Config):
    """The mean of the other experts' rows."""

    type: Literal["mean"] = "mean"


class RandomRow(Config):
    """A random direction in every layer."""

    type: Literal["random"] = "random"
    seed: Seed = 0
    """Seeds the draw."""


RowConfig = Annotated[
    CentroidRow | DomainEmbeddingRow | ZeroRow | MeanRow | RandomRow,
    Field(discriminator="type"),
]


class AppendConfig(Config):
    """A domain's branch joins a Mixture-of-Experts as one more expert of every layer (arXiv 2408.15901, 2507.07024)."""

    domain: DomainName
    """The domain: names the expert, and the tokens that a router row starts from."""
    router: RowConfig = CentroidRow()
    """How the expert's router row starts. All but `zero` are scaled to the mean norm of the rows that are there and
    not zero."""
    output_scale: float | None = Field(None, gt=0)
    """Factor of the expert's output; none: 1, and beside a shared expert 1/2, as the mix stage has it."""
    max_shard_bytes: int = Field(MAX_SHARD_BYTES, ge=1)
    """Largest weight file; a larger checkpoint is written as shards with an index."""

    @field_validator("domain")
    @classmethod
    def _is_a_domains(cls, name: str) -> str:
        if name in RESERVED:
            raise ValueError(f"{name!r} names an expert that is no domain's")
        return name


class RemoveConfig(Config):
    """Experts are taken out of a Mixture-of-Experts, with their router rows."""

    experts: tuple[ExpertName, ...] = ()
    """Experts to take out of every layer: by number, or by what they were made from (then all of that name)."""
    layers: dict[Annotated[int, Field(ge=0)], tuple[ExpertName, ...]] = Field(default_factory=dict)
    """Further ones by layer. Every layer must lose as many."""
    max_shard_bytes: int = Field(MAX_SHARD_BYTES, ge=1)
    """Largest weight file; a larger checkpoint is written as shards with an index."""

    @field_validator("experts")
    @classmethod
    def _experts_in_order(cls, experts: tuple[int | str, ...]) -> tuple[int | str, ...]:
        """Order and repetition mean nothing, so they are no part of identity."""
        return _in_order(experts)

    @field_validator("layers")
    @classmethod
    def _layers_in_order(cls, layers: dict[int, tuple[int | str, ...]]) -> dict[int, tuple[int | str, ...]]:
        return {layer: _in_order(experts) for layer, experts in sorted(layers.items())}

    @model_validator(mode="after")
    def _names_something(self) -> "RemoveConfig":
        if not self.experts and not any(self.layers.values()):
            raise ValueError("experts: name at least one expert to remove")
        return self


def _in_order(experts: tuple[int | str, ...]) -> tuple[int | str, ...]:
    return tuple(sorted(set(experts), key=lambda item: (isinstance(item, str), item)))
