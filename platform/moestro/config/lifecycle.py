"""`LifecycleConfig`: the whole walk in one object, and `Resources`, which says where and with how much it runs."""

from typing import Annotated

from pydantic import Field, model_validator

from moestro.config.base import EXECUTION, Config
from moestro.config.branches import BranchesConfig
from moestro.config.data import DataConfig, TokensConfig
from moestro.config.deploying import DeployConfig
from moestro.config.mixing import MixConfig
from moestro.config.rl import AnyRl
from moestro.config.stages import (
    AnyBranch,
    CompressConfig,
    EvaluateConfig,
    ProfileConfig,
    SeedConfig,
)
from moestro.config.tuning import TuneConfig, check_tuning

SERVED_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Sizes of an attention head that vLLM's CPU attention has kernels for."""


class Resources(Config):
    """Execution, never identity: changing any of this runs no stage again."""

    cpus: int | None = Field(None, ge=1)
    """Cores to use; default all."""
    branch_cpus: int = Field(1, ge=1)
    """Cores per branch; branches run side by side as cores allow."""
    branch_workers: int = Field(1, ge=1)
    """Workers that train one model together, data-parallel, each with cores of its own; their number times
    `accumulation` must divide `batch_size`."""
    max_retries: int = Field(3, ge=0)
    """How often a stage whose worker was lost is resumed."""


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
    rl: AnyRl | None = None
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

    def branch_configs(self) -> dict[str, AnyBranch]:
        """The branch config of every domain that becomes an expert, in the domains' order."""
        unify = self.mix.unify_vocabulary
        return {name: self.branch.config(name, unify_vocabulary=unify) for name in self.data.names("expert")}

    def general_text(self, branch: str) -> tuple[str, ...]:
        """The domains that the branch of that domain takes general text from; none if it takes no such text."""
        if not self.branch.share_of(branch):
            return ()
        return self.data.names("general") or tuple(name for name in self.data.names() if name != branch)

    def seed_text(self) -> tuple[str, ...]:
        """The domains that the seed is pre-trained on; none if it is imported."""
        return () if self.seed.type == "import" else self.seed.domains or self.data.names()

    @model_validator(mode="after")
    def _fits_together(self) -> "LifecycleConfig":
        names, experts = self.data.names(), self.data.names("expert")
        if len(set(names)) != len(names):
            raise ValueError(f"data.domains: names must differ, got {list(names)}")
        self._branches_fit()
        reserved = {"seed", "blend"} & set(names)
        if reserved:
            raise ValueError(f"data.domains: {sorted(reserved)[0]!r} names an expert of the mix that is no domain's")
        try:
            self.mix.check(experts)
        except ValueError as error:
            raise ValueError(f"mix.{error}") from None
        self._compression_fits(len(self.mix.expert_origins(experts)))
        return self

    def _branches_fit(self) -> None:
        try:
            self.branch.check(self.data.names("expert"), self.data.names("general"))
        except ValueError as error:
            raise ValueError(f"branch.{error}") from None
        self.branch_configs()
        if unknown := sorted(set(self.seed_text()) - set(self.data.names())):
            raise ValueError(f"seed.domains: no domain named {unknown}; domains are {list(self.data.names())}")

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
    def _tuning_suits_the_mix(self) -> "LifecycleConfig":
        if self.tune:
            origins = self.mix.expert_origins(self.data.names("expert"))
            try:
                check_tuning(self.tune, self.mix, origins=origins, domains=self.data.names())
            except ValueError as error:
                raise ValueError(f"tune.{error}") from None
        return self

    @model_validator(mode="after")
    def _workers_share_batches(self) -> "LifecycleConfig":
        workers = self.resources.branch_workers
        trained = {f"the branch {name}": config for name, config in self.branch_configs().items()}
        for name, config in {"seed": self.seed, "tune": self.tune, **trained}.items():
            training = getattr(config, "training", None)
            if training and training.batch_size % (training.accumulation * workers):
                raise ValueError(
                    f"resources.branch_workers: {workers} workers cannot share the training of {name}: its batch_size "
                    f"({training.batch_size}) does not divide by {workers} times its accumulation "
                    f"({training.accumulation})"
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
    def _gates_name_domains(self) -> "LifecycleConfig":
        bounded = self.deploy.quality.max_held_out_loss if self.deploy else {}
        if unknown := sorted(set(bounded) - set(self.data.names())):
            raise ValueError(
                f"deploy.quality.max_held_out_loss: no domain named {unknown}; domains are {list(self.data.names())}"
            )
        return self

    @model_validator(mode="after")
    def _sequences_fit(self) -> "LifecycleConfig":
        if self.seed.type == "import":
            return self
        lengths = {
            "evaluate.sequence_length": self.evaluate.sequence_length,
        }
        if self.branch.training:
            lengths["branch.training.sequence_length"] = self.branch.training.sequence_length
        for name, override in self.branch.overrides.items():
            if override.training:
                lengths[f"branch.overrides.{name}.training.sequence_length"] = override.training.sequence_length
        if self.tune:
            lengths["tune.training.sequence_length"] = self.tune.training.sequence_length
        if self.deploy:
            lengths["deploy.max_model_len"] = self.deploy.max_model_len
        longest = self.seed.model.max_position_embeddings
        for field, length in lengths.items():
            if length > longest:
                raise ValueError(f"{field}: {length} is longer than seed.model.max_position_embeddings ({longest})")
        return self
