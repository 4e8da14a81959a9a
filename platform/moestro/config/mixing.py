"""How dense checkpoints become one Mixture-of-Experts: `MixConfig`, and the variants of its decisions.

What experts are made of (`experts`, in `moestro.config.experts`), what happens to all other weights (`rest`), how the
router starts (`router`).
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from moestro.config.base import Config
from moestro.config.experts import (
    BlendedExperts,
    DivMoeExperts,
    DomainExperts,
    DropUpcyclingExperts,
    ExpertsConfig,
    FineGrainedExperts,
    SparseUpcyclingExperts,
)
from moestro.config.seeds import Seed


class KeepSeed(Config):
    """The seed's own weights."""

    type: Literal["seed"] = "seed"


class Mean(Config):
    """The unweighted mean (arXiv 2403.07816)."""

    type: Literal["mean"] = "mean"
    include_seed: bool = True
    """Whether the seed is one of the models averaged."""


class Ties(Config):
    """Task vectors, trimmed, with elected signs, combined and added to the seed (TIES, arXiv 2306.01708)."""

    type: Literal["ties"] = "ties"
    density: float = Field(0.5, gt=0, le=1)
    """Share of each task vector that is kept, largest magnitudes first, weight tensor by weight tensor."""
    combine: Literal["mean", "sum"] = "mean"
    """Of the values that agree with the elected sign; `mean`: their mean, as the paper has it; `sum`: as MergeME has it
    (arXiv 2502.00997), further from the seed the more branches agree."""
    weight: float = Field(1.0, gt=0)
    """Factor of the merged task vector."""


class Dare(Config):
    """Task vectors, part dropped at random, the rest rescaled, combined and added to the seed (DARE, 2311.03099)."""

    type: Literal["dare"] = "dare"
    density: float = Field(0.5, gt=0, le=1)
    """Share of each task vector that is kept."""
    combine: Literal["mean", "sum"] = "mean"
    """Of the branches' vectors; `mean`: in expectation the mean of the branches; `sum`: as MergeME has it (arXiv
    2502.00997), as many times further from the seed as there are branches unless `weight` makes up for it."""
    weight: float = Field(1.0, gt=0)
    """Factor of the merged task vector."""
    seed: Seed = 0
    """Seeds the choice."""


MergeConfig = Annotated[KeepSeed | Mean | Ties | Dare, Field(discriminator="type")]


class RestConfig(Config):
    """What becomes of the weights that are no expert's, per module group. Branches that trained their feed-forward
    networks alone agree on all of them, and whatever all agree on stays as it is."""

    attention: MergeConfig = Mean()
    """Attention projections, their biases and norms inside the attention."""
    norms: MergeConfig = Mean()
    """Norms of layers and of the output."""
    embeddings: MergeConfig = Mean()
    """Embedding and output head."""


class ZeroRouter(Config):
    """All logits zero: with identical experts the result is the dense model.

    Bit for bit, where the number chosen per token is a power of two: gates of 1/3 do not add up to 1 exactly.
    """

    type: Literal["zero"] = "zero"


class RandomRouter(Config):
    """Rows drawn from a normal distribution (arXiv 2403.07816)."""

    type: Literal["random"] = "random"
    std: float = Field(0.02, gt=0)
    """Standard deviation."""
    seed: Seed = 0
    """Seeds the draw."""


class CentroidRouter(Config):
    """Each domain's mean hidden state before the layer's experts, less the overall mean."""

    type: Literal["centroid"] = "centroid"
    calibration_tokens: int = Field(8192, ge=256)
    """Tokens per domain that the seed reads."""
    spread: float = Field(1.0, gt=0)
    """Standard deviation of a layer's logits; the larger, the more a token's best expert outweighs the others."""


class DomainEmbeddingRouter(Config):
    """One embedding per domain, the seed's mean last hidden state, gives its row in every layer (FlexOlmo, Nexus)."""

    type: Literal["domain_embedding"] = "domain_embedding"
    calibration_tokens: int = Field(8192, ge=256)
    """Tokens per domain that the seed reads."""


class Prompts(Config):
    """Text that an expert should, and should not, be chosen for."""

    positive: tuple[str, ...] = Field(min_length=1)
    """Text like what the expert is for."""
    negative: tuple[str, ...] = ()
    """Text like what it is not for."""


class PromptRouter(Config):
    """Mean hidden state of each expert's prompts under the seed, less that of its negative ones (as mergekit does)."""

    type: Literal["prompts"] = "prompts"
    prompts: dict[str, Prompts] = Field(min_length=1)
    """By name of what an expert is made from: a domain, or `seed`. One without prompts gets a zero row."""


class ErcRouter(Config):
    """Rows coupled with the experts by weights alone: each excites its own expert most (ERC, arXiv 2512.23447)."""

    type: Literal["erc"] = "erc"
    alpha: float = Field(1.0, ge=0, le=1)
    """Share of what a row makes of its own expert that it may make of others; smaller is stricter."""
    steps: int = Field(100, ge=1)
    """Gradient steps on the loss, in every layer."""
    std: float = Field(0.02, gt=0)
    """Standard deviation of every row's weights."""
    seed: Seed = 0
    """Seeds the draw that the steps begin with."""


RouterConfig = Annotated[
    ZeroRouter | RandomRouter | CentroidRouter | DomainEmbeddingRouter | PromptRouter | ErcRouter,
    Field(discriminator="type"),
]

Target = Literal["auto", "mixtral", "qwen2_moe", "qwen3_moe", "flex_olmo", "granitemoe", "glm4_moe"]


class MixConfig(Config):
    """Dense checkpoints become one Mixture-of-Experts."""

    target: Target = "auto"
    """Architecture of the result; `auto`: the one that carries the seed and all that is asked for here."""
    experts: ExpertsConfig = DomainExperts()
    """What experts are made of."""
    generalist: Literal["none", "expert", "shared"] = "expert"
    """The seed's own feed-forward networks: left out, a routed expert, or a shared expert that every token passes."""
    num_experts_per_tok: int = Field(2, ge=1)
    """Experts chosen per token."""
    selection: Literal["softmax", "loss_free"] = "softmax"
    """`softmax`: the largest logits; `loss_free`: sigmoid scores with a correction bias on the choice
    (arXiv 2408.15664). The bias starts at zero; `loss_free` and `bip` of `tune.losses` move it."""
    num_groups: int = Field(1, ge=1)
    """Groups of experts of which only some are chosen from (`loss_free` alone)."""
    num_groups_per_tok: int = Field(1, ge=1)
    """Groups chosen per token."""
    rest: RestConfig = RestConfig()
    """What becomes of all other weights."""
    router: RouterConfig = CentroidRouter()
    """How the router starts."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type the weights are stored in; `auto`: the seed's, and float32 where that is float64, which no engine serves."""
    unify_vocabulary: bool = False
    """Accept models of which one's vocabulary only adds tokens to another's, or is padded further: the largest becomes
    everyone's, and its special tokens, chat template and generation config with it. A row of embedding and head is
    merged from the models that know its token."""
    max_shard_bytes: int = Field(5_000_000_000, ge=1)
    """Largest weight file; a larger checkpoint is written as shards with an index."""

    def expert_origins(self, branches: tuple[str, ...]) -> tuple[str, ...]:
        """What each routed expert is made from, in order: names of `branches`, `seed`, or `blend`.

        Raises `ValueError` if the recipe needs branches and there are none.
        """
        copies = self.copies_of_seed()
        if copies:
            return ("seed",) * copies
        if not branches:
            raise ValueError(
                f"experts: those of type {self.experts.type!r} need at least one branch, there is no branch"
            )
        whole = (*branches, *(("seed",) if self.generalist == "expert" else ()))
        match self.experts:
            case FineGrainedExperts(granularity=count):
                return whole * count
            case DivMoeExperts(slices=count):
                return tuple(name for name in whole for _ in range(count))
            case BlendedExperts():
                return ("blend",) * len(whole)
        return whole

    def chosen_per_token(self) -> int:
        """How many of the routed experts a token passes through."""
        slices = self.experts.granularity if isinstance(self.experts, FineGrainedExperts) else 1
        return self.num_experts_per_tok * slices

    def check(self, branches: tuple[str, ...]) -> None:
        """Raise `ValueError`, the field's name first, unless these decisions can be carried out on `branches`."""
        experts = len(self.expert_origins(branches))
        if experts < 2:
            raise ValueError(
                f"experts: {experts} routed expert leaves the router nothing to choose; "
                "add branches, or set generalist to expert"
            )
        self.check_choice(experts)
        if isinstance(self.router, PromptRouter):
            known = {*branches, *(("seed",) if self.generalist == "expert" else ())}
            if unknown := sorted(self.router.prompts.keys() - known):
                raise ValueError(f"router.prompts: no expert is made from {unknown}; there are {sorted(known)}")

    def check_choice(self, experts: int) -> None:
        """Raise `ValueError`, the field's name first, unless a token can choose as it must among that many experts."""
        chosen, groups = self.chosen_per_token(), self.num_groups
        if chosen > experts:
            raise ValueError(f"num_experts_per_tok: chooses {chosen} of only {experts} experts")
        if experts % groups:
            raise ValueError(f"num_groups: {groups} groups do not divide {experts} experts")
        size = experts // groups
        if groups > 1 and size < 2:
            raise ValueError(
                f"num_groups: {groups} groups of {experts} experts hold {size} each; a group is judged by its two best"
            )
        if chosen > self.num_groups_per_tok * size:
            raise ValueError(
                f"num_groups_per_tok: {self.num_groups_per_tok} of {groups} groups hold "
                f"{self.num_groups_per_tok * size} experts, fewer than the {chosen} chosen per token"
            )

    def copies_of_seed(self) -> int:
        """How many copies of the seed the experts are; 0: branches lend them, and are needed."""
        match self.experts:
            case SparseUpcyclingExperts(num_experts=count) | DropUpcyclingExperts(of="seed", num_experts=count):
                return count
        return 0

    @model_validator(mode="after")
    def _groups_fit(self) -> "MixConfig":
        if self.num_groups_per_tok > self.num_groups:
            raise ValueError(f"num_groups_per_tok: {self.num_groups_per_tok} of only {self.num_groups} groups")
        if self.num_groups > 1 and self.selection != "loss_free":
            raise ValueError("num_groups: groups are chosen by `selection: loss_free` alone")
        if self.num_groups > 1 and self.experts.type == "fine_grained":
            raise ValueError(
                "num_groups: groups would part the slices of one expert; leave fine-grained experts ungrouped"
            )
        return self

    @model_validator(mode="after")
    def _router_fits(self) -> "MixConfig":
        router = self.router.type
        if router == "zero" and self.experts.type == "fine_grained":
            raise ValueError(
                "router: a zero router cannot tell the slices of one expert from those of another; "
                "take another router for fine-grained experts"
            )
        able = ["zero", "random", *(["erc"] if self.experts.type == "drop_upcycling" else [])]
        if self.copies_of_seed() and router not in able:
            raise ValueError(
                f"router: copies of the seed belong to no domain that a {router} router could start from; "
                f"take {' or '.join(able)}"
            )
        if self.experts.type == "blended" and router not in {"zero", "random", "erc"}:
            raise ValueError(
                f"router: blended experts belong to all domains, a {router} router cannot tell them apart; "
                "take zero, random or erc"
            )
        return self

    @model_validator(mode="after")
    def _copies_are_enough(self) -> "MixConfig":
        if self.copies_of_seed():
            self.check(())
        return self
