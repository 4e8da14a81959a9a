"""What the experts of a mix are made of: one config a recipe, `ExpertsConfig` any of them."""

from typing import Annotated, Literal

from pydantic import Field

from moestro.config.base import Config
from moestro.config.seeds import Seed


class DomainExperts(Config):
    """One expert per branch: Branch-Train-MiX (arXiv 2403.07816)."""

    type: Literal["domains"] = "domains"


class FineGrainedExperts(Config):
    """Every expert cut into slices that share one router row: virtual groups (arXiv 2410.07524).

    `num_experts_per_tok` counts whole experts: the checkpoint chooses that many times `granularity` slices.
    """

    type: Literal["fine_grained"] = "fine_grained"
    granularity: int = Field(2, ge=2)
    """Slices per expert; must divide the width of the feed-forward network."""


class DivMoeExperts(Config):
    """Every branch's network cut into slices, each an expert with a router row of its own (DivMoE, arXiv 2610.11317).

    Its rule that a token takes at most one slice per branch is in no architecture that vLLM serves, and is left out.
    """

    type: Literal["divmoe"] = "divmoe"
    slices: int = Field(2, ge=2)
    """Slices per branch; must divide the width of the feed-forward network."""


class SparseUpcyclingExperts(Config):
    """Copies of the seed's network; branches are not needed (arXiv 2212.05055)."""

    type: Literal["sparse_upcycling"] = "sparse_upcycling"
    num_experts: int = Field(4, ge=2)
    """Copies."""


class DropUpcyclingExperts(Config):
    """Experts with part of their intermediate features drawn anew (arXiv 2502.19261)."""

    type: Literal["drop_upcycling"] = "drop_upcycling"
    of: Literal["seed", "branches"] = "seed"
    """`seed`: `num_experts` copies of the seed; `branches`: one expert per branch."""
    num_experts: int = Field(4, ge=2)
    """Copies, where they are the seed's."""
    ratio: float = Field(0.5, ge=0, le=1)
    """Share of every routed expert's intermediate features that is drawn anew."""
    seed: Seed = 0
    """Seeds the choice of features and their new weights."""


class BlendedExperts(Config):
    """Expert n is made of the n-th slice of every branch (arXiv 2403.07816, section 3.3)."""

    type: Literal["blended"] = "blended"


ExpertsConfig = Annotated[
    DomainExperts | FineGrainedExperts | DivMoeExperts | SparseUpcyclingExperts | DropUpcyclingExperts | BlendedExperts,
    Field(discriminator="type"),
]
