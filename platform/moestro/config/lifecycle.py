"""`LifecycleConfig`: the whole walk in one object, and `Resources`, which says where and with how much it runs."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from moestro.config.base import EXECUTION, Config
from moestro.config.data import DataConfig, DomainName, TokensConfig
from moestro.config.mixing import MixConfig
from moestro.config.routing import BIASED
from moestro.config.stages import (
    BranchConfig,
    CompressConfig,
    DeployConfig,
    EvaluateConfig,
    ProfileConfig,
    RlConfig,
    SeedConfig,
    TuneConfig,
)
from moestro.config.training import TrainingConfig

SERVED_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Sizes of an attention head that vLLM's CPU attention has kernels for."""


class Resources(Config):
    """Execution, never identity: changing any of this runs no stage again."""

    cpus: int | None = Field(None, ge=1)
    """Cores to use; default all."""
    branch_cpus: int = Field(1, ge=1)
    """Cores per branch; branches run side by side as cores allow."""
    max_retries: int = Field(3, ge=0)
    """How often a stage whose worker was lost is resumed."""


class BranchesConfig(Config):
    """How every domain's branch is trained; `overrides` replaces the training of single domains."""

    training: TrainingConfig
    """The training run of each branch."""
    trainable: Literal["all", "ffn"] = "ffn"
    """Which weights train: `all` or `ffn`."""
    overrides: dict[DomainName, TrainingConfig] = Field(default_factory=dict)
    """Another training run for the named domains."""


class LifecycleConfig(Config):
    """One lifecycle, from seed to deployment. A stage that is left out is not run, nor are those that need it."""

    name: Annotated[str, EXECUTION] = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    """Name of the lifecycle: names runs in Prefect and MLflow. Not identity."""
    data: DataConfig
    """The domains."""
    seed: SeedConfig
    """The dense checkpoint everything starts from."""
    tokens: TokensConfig = TokensConfig()
    """How much text each domain contributes."""
    branch: BranchesConfig
    """The domains' branches."""
    mix: MixConfig = MixConfig()
    """Branches become one MoE."""
    tune: TuneConfig | None = None
    """Fine-tuning of the MoE."""
    rl: RlConfig | None = None
    """Reinforcement learning."""
    compress: CompressConfig | None = None
    """Expert pruning."""
    deploy: DeployConfig | None = None
    """Serving."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Measured after every stage."""
    profile: ProfileConfig = ProfileConfig()
    """Measured after every stage whose result is an MoE."""
    resources: Annotated[Resources, EXECUTION] = Resources()
    """Where and with how much it runs; not identity."""

    def branch_configs(self) -> dict[str, BranchConfig]:
        """Each domain's branch config, in the domains' order."""
        names = [domain.name for domain in self.data.domains]
        return {
            name: BranchConfig.model_validate(
                {
                    "domain": name,
                    "training": self.branch.overrides.get(name, self.branch.training),
                    "trainable": self.branch.trainable,
                }
            )
            for name in names
        }

    @model_validator(mode="after")
    def _fits_together(self) -> "LifecycleConfig":
        names = [domain.name for domain in self.data.domains]
        if len(set(names)) != len(names):
            raise ValueError(f"data.domains: names must differ, got {names}")
        unknown = set(self.branch.overrides) - set(names)
        if unknown:
            raise ValueError(f"branch.overrides: no domain named {sorted(unknown)}; domains are {names}")
        reserved = {"seed", "blend"} & set(names)
        if reserved:
            raise ValueError(f"data.domains: {sorted(reserved)[0]!r} names an expert of the mix that is no domain's")
        try:
            self.mix.check(tuple(names))
        except ValueError as error:
            raise ValueError(f"mix.{error}") from None
        self._compression_fits(len(self.mix.expert_origins(tuple(names))))
        return self

    def _compression_fits(self, experts: int) -> None:
        if not self.compress:
            return
        kept, chosen = self.compress.num_experts, self.mix.chosen_per_token()
        if not chosen <= kept <= experts:
            raise ValueError(
                f"compress.num_experts: must lie between the {chosen} experts chosen per token "
                f"and the {experts} experts of the mix"
            )
        try:
            self.mix.check_choice(kept)
        except ValueError as error:
            raise ValueError(f"compress.num_experts: {kept} experts do not suit the mix ({error})") from None

    @model_validator(mode="after")
    def _losses_suit_the_router(self) -> "LifecycleConfig":
        biased = self.mix.selection == "loss_free"
        for loss in self.tune.losses if self.tune else ():
            if loss.type == "z_loss" and biased:
                raise ValueError(
                    "tune.losses: mix.selection is loss_free, whose sigmoids have no normaliser for a z_loss"
                )
            if loss.type in BIASED and not biased:
                raise ValueError(
                    f"tune.losses: {loss.type} moves a correction bias, which takes mix.selection: loss_free"
                )
        return self

    @model_validator(mode="after")
    def _heads_can_be_served(self) -> "LifecycleConfig":
        if self.seed.type == "import" or not (self.rl or self.deploy):
            return self
        size = self.seed.model.hidden_size // self.seed.model.num_attention_heads
        if size not in SERVED_HEAD_SIZES:
            raise ValueError(
                f"seed.model.num_attention_heads: {self.seed.model.num_attention_heads} makes heads of {size}, "
                f"vLLM on CPU serves heads of {', '.join(map(str, SERVED_HEAD_SIZES))}"
            )
        return self

    @model_validator(mode="after")
    def _sequences_fit(self) -> "LifecycleConfig":
        if self.seed.type == "import":
            return self
        lengths = {
            "branch.training.sequence_length": self.branch.training.sequence_length,
            "evaluate.sequence_length": self.evaluate.sequence_length,
        }
        for name, training in self.branch.overrides.items():
            lengths[f"branch.overrides.{name}.sequence_length"] = training.sequence_length
        if self.tune:
            lengths["tune.training.sequence_length"] = self.tune.training.sequence_length
        if self.deploy:
            lengths["deploy.max_model_len"] = self.deploy.max_model_len
        longest = self.seed.model.max_position_embeddings
        for field, length in lengths.items():
            if length > longest:
                raise ValueError(f"{field}: {length} is longer than seed.model.max_position_embeddings ({longest})")
        return self
