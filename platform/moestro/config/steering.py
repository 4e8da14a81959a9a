"""Configs of steering profiles, one per method: which experts a request's tokens shall take or leave."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from moestro.config.base import Config
from moestro.config.data import DomainName

Layer = Annotated[int, Field(ge=0)]
Expert = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class DomainContrast(Config):
    """The experts that tokens of some domains choose more often than tokens of others (fTRI, arXiv 2502.11096)."""

    type: Literal["domains"] = "domains"
    target: tuple[DomainName, ...] = Field(min_length=1)
    """Domains whose experts are looked for."""
    against: tuple[DomainName, ...] = ()
    """Domains they are set off from; none: all others handed in."""
    count: int = Field(10, ge=1)
    """Experts to select, over all layers."""
    sequence_length: int = Field(256, ge=8)
    """Length of the training windows that count as prompts."""
    max_tokens: int = Field(16_384, ge=256)
    """Training tokens per domain."""

    @model_validator(mode="after")
    def _disjoint(self) -> "DomainContrast":
        if both := sorted({*self.target} & {*self.against}):
            raise ValueError(f"against: {both[0]!r} is among the targets too")
        return self


class PromptContrast(Config):
    """The experts that the tokens of some prompts choose more often than those of others (fTRI, arXiv 2502.11096)."""

    type: Literal["prompts"] = "prompts"
    target: tuple[str, ...] = Field(min_length=1)
    """Prompts whose experts are looked for."""
    against: tuple[str, ...] = Field(min_length=1)
    """Prompts they are set off from."""
    count: int = Field(10, ge=1)
    """Experts to select, over all layers."""

    @field_validator("target", "against")
    @classmethod
    def _have_text(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        if not all(prompt.strip() for prompt in prompts):
            raise ValueError("a prompt is empty")
        return prompts


Selection = Annotated[DomainContrast | PromptContrast, Field(discriminator="type")]


class LossGate(Config):
    """What a profile may cost: held-out loss of the steered model against the unsteered one, in transformers."""

    sequence_length: int = Field(256, ge=8)
    """Length of the held-out windows."""
    max_tokens: int = Field(8192, ge=256)
    """Held-out tokens per domain."""
    max_loss_increase: float = Field(0.5, ge=0)
    """Largest allowed increase in nats per token, in any of the domains handed in."""


class SteeringProfile(Config):
    """What all profiles have."""

    name: str = Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}$")
    """What requests call the profile."""
    gate: LossGate = LossGate()
    """The gate."""


class ExpertSteering(SteeringProfile):
    """What profiles have that act on named experts."""

    experts: dict[Layer, tuple[Expert, ...]] = Field(default_factory=dict)
    """Experts by sparse layer, both counted from 0."""
    select: Selection | None = None
    """How experts are selected by what they are chosen for, instead of naming them."""

    @field_validator("experts")
    @classmethod
    def _in_order(cls, experts: dict[int, tuple[int, ...]]) -> dict[int, tuple[int, ...]]:
        """Order and repetition mean nothing, so they are no part of identity."""
        return {layer: tuple(sorted(set(ids))) for layer, ids in sorted(experts.items()) if ids}

    @model_validator(mode="after")
    def _one_way(self) -> "ExpertSteering":
        if bool(self.experts) == (self.select is not None):
            raise ValueError("experts: name experts, or say under `select` how they are found; one of the two")
        return self


class SuppressProfile(ExpertSteering):
    """Named experts' gates become 0 and those of the others chosen grow in proportion; none takes their place (MoTE,
    arXiv 2502.11096)."""

    method: Literal["suppress"] = "suppress"
    """The method."""


class BoostProfile(ExpertSteering):
    """Named experts are chosen by every token, with logits just above the largest (SteerMoE, arXiv 2509.09660)."""

    method: Literal["boost"] = "boost"
    """The method."""
    margin: float = Field(0.01, gt=0)
    """How far above the largest logit theirs are set."""


class LanguageProfile(SteeringProfile):
    """Experts that a language's or domain's tokens prefer get larger logits in the middle layers (arXiv 2510.04694)."""

    method: Literal["language"] = "language"
    """The method."""
    target: DomainName
    """The language or domain steered to."""
    generic: tuple[DomainName, ...] = ()
    """What it is set off from; none: all other domains handed in."""
    strength: float = Field(0.5, gt=0)
    """How much is added to a preferred expert's logit, in standard deviations of a token's logits."""
    threshold: float = Field(0.2, ge=0, lt=1)
    """By how much more of the target's tokens than of the generic ones must choose an expert."""
    begin: Share = 0.25
    """Share of the layers before the first middle one."""
    end: Share = 0.75
    """Share of the layers up to the last middle one."""
    sequence_length: int = Field(256, ge=8)
    """Length of the training windows that routing is measured on."""
    max_tokens: int = Field(16_384, ge=256)
    """Training tokens per domain."""

    @model_validator(mode="after")
    def _fits(self) -> "LanguageProfile":
        if self.begin >= self.end:
            raise ValueError("begin: must be below end")
        if self.target in self.generic:
            raise ValueError(f"generic: {self.target!r} is the target")
        return self


class ContrastProfile(SteeringProfile):
    """Self-contrast: a second pass through weaker experts is subtracted from the model's logits (SCMoE, 2405.14507)."""

    method: Literal["contrast"] = "contrast"
    """The method."""
    alpha: float = Field(0.1, gt=0, le=1)
    """Tokens less probable than this share of the likeliest one's probability are ruled out."""
    beta: float = Field(0.5, gt=0)
    """Weight of the difference between both passes."""
    weak_rank: int = Field(3, ge=1)
    """The weak pass sends every token through one expert, the one its router ranks here; 1 is the likeliest."""


AnyProfile = Annotated[
    SuppressProfile | BoostProfile | LanguageProfile | ContrastProfile,
    Field(discriminator="method"),
]
