"""How a lifecycle's branches come about: one plan for all, what differs for single domains, and those that exist."""

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from moestro.config.base import EXECUTION, Config
from moestro.config.data import DomainName
from moestro.config.stages import AnyBranch, BranchConfig, ImportBranch, Share
from moestro.config.training import TrainingConfig


class ExistingBranch(Config):
    """A checkpoint that was trained from the seed elsewhere."""

    path: Annotated[str, EXECUTION]
    """A local Hugging Face directory or a GGUF file, or `package:NAME` for the one an installed package carries.
    Where it lies is not identity: the files' contents are."""


class BranchOverride(Config):
    """What is different for one domain's branch; what is left out is as for all."""

    training: TrainingConfig | None = None
    """Another training run, as a whole."""
    trainable: Literal["all", "ffn"] | None = None
    """Other weights that train."""
    general_share: Share | None = None
    """Another share of general text."""

    @model_validator(mode="after")
    def _changes_something(self) -> "BranchOverride":
        if self.training is None and self.trainable is None and self.general_share is None:
            raise ValueError(f"changes nothing; give {', '.join(type(self).model_fields)}, or leave it out")
        return self


class BranchesConfig(Config):
    """How every expert's branch comes about."""

    existing: dict[DomainName, ExistingBranch] = Field(default_factory=dict)
    """Checkpoints that are there already, by domain: brought in, not trained."""
    training: TrainingConfig | None = None
    """The training run of each branch; needed unless all exist or have one of their own."""
    trainable: Literal["all", "ffn"] = "ffn"
    """Which weights train: `all` or `ffn`."""
    general_share: Share = 0.0
    """Share of each branch's sequences that come from the domains of role `general`, all alike; where there is none,
    from all other domains."""
    overrides: dict[DomainName, BranchOverride] = Field(default_factory=dict)
    """What is different for the named domains."""

    @field_validator("training")
    @classmethod
    def _trained_or_existing(cls, training: TrainingConfig | None, info: ValidationInfo) -> TrainingConfig | None:
        if training is None and not info.data.get("existing"):
            raise ValueError("required field is missing")
        return training

    def share_of(self, domain: str) -> float:
        """The share of general text in the branch of `domain`: none in one that exists."""
        if domain in self.existing:
            return 0.0
        own = self.override(domain).general_share
        return self.general_share if own is None else own

    def override(self, domain: str) -> BranchOverride:
        """What is different for `domain`, maybe nothing."""
        return self.overrides.get(domain, BranchOverride.model_construct())

    def config(self, domain: str, *, unify_vocabulary: bool) -> AnyBranch:
        """The stage's config for the branch of `domain`."""
        if domain in self.existing:
            path = self.existing[domain].path
            return ImportBranch(domain=domain, path=path, unify_vocabulary=unify_vocabulary)
        own = self.override(domain)
        training = own.training or self.training
        if training is None:
            raise ValueError(f"branch.training: required field is missing: the branch of {domain} is to be trained")
        return BranchConfig(
            domain=domain,
            training=training,
            trainable=own.trainable or self.trainable,
            general_share=self.share_of(domain),
        )

    def check(self, experts: tuple[str, ...], general: tuple[str, ...]) -> None:
        """Raise `ValueError`, the field's name first, unless this can be done with domains of these names and roles."""
        for field, named in (("overrides", self.overrides), ("existing", self.existing)):
            if idle := sorted(named.keys() & set(general)):
                raise ValueError(f"{field}: {idle[0]} is general text, it has no branch")
            if unknown := sorted(named.keys() - set(experts)):
                raise ValueError(f"{field}: no domain named {unknown}; domains are {list(experts)}")
        if both := sorted(self.overrides.keys() & self.existing.keys()):
            raise ValueError(f"overrides: {both[0]} is not trained, its branch exists")
        for name in experts:
            if self.share_of(name) and not general and len(experts) == 1:
                raise ValueError(f"general_share: there is no domain but {name} to take general text from")
