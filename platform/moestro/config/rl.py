"""Configs of the rl stage: policy optimisation on rollouts, and its offline sibling on pairs of answers."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from moestro.config.base import EXECUTION, Config
from moestro.config.data import TaskConfig
from moestro.config.seeds import Seed
from moestro.config.training import OptimizerConfig


class Grpo(Config):
    """Clipped surrogate, mean over a sequence's tokens, then over sequences (GRPO, arXiv 2402.03300)."""

    type: Literal["grpo"] = "grpo"
    clip: float = Field(0.2, gt=0, lt=1)
    """How far below 1 the importance ratio still counts."""
    clip_high: float | None = Field(None, gt=0)
    """How far above 1; default as far as below."""


class DrGrpo(Config):
    """GRPO without its biases: sums over `max_tokens`, advantages unscaled (Dr. GRPO, arXiv 2503.20783)."""

    type: Literal["dr_grpo"] = "dr_grpo"
    clip: float = Field(0.2, gt=0, lt=1)
    """How far below 1 the importance ratio still counts."""
    clip_high: float | None = Field(None, gt=0)
    """How far above 1; default as far as below."""


class Dapo(Config):
    """Clipped surrogate, mean over all tokens of the batch, clipped higher above (DAPO, arXiv 2503.14476)."""

    type: Literal["dapo"] = "dapo"
    clip: float = Field(0.2, gt=0, lt=1)
    """How far below 1 the importance ratio still counts."""
    clip_high: float | None = Field(0.28, gt=0)
    """How far above 1; null: as far as below."""


class Gspo(Config):
    """One importance ratio per sequence, the geometric mean of its tokens' (GSPO, arXiv 2507.18071)."""

    type: Literal["gspo"] = "gspo"
    clip: float = Field(3e-4, gt=0, lt=1)
    """How far below 1 the ratio still counts."""
    clip_high: float | None = Field(4e-4, gt=0)
    """How far above 1; null: as far as below."""


class Cispo(Config):
    """Clips the importance weight, never the gradient: every token teaches (CISPO, arXiv 2506.13585)."""

    type: Literal["cispo"] = "cispo"
    max_ratio: float = Field(5.0, gt=1)
    """Largest importance weight."""


AlgorithmConfig = Annotated[Grpo | DrGrpo | Dapo | Gspo | Cispo, Field(discriminator="type")]


class Correction(Config):
    """Weights each token by how much likelier it is in the trainer than it was in the engine that sampled it."""

    type: Literal["truncate", "mask"] = "truncate"
    """`truncate`: weights above `high` count as `high` (TIS); `mask`: weights outside [`low`, `high`] count as 0."""
    level: Literal["token", "sequence"] = "token"
    """One weight per token, or one per sequence, the product of its tokens'."""
    high: float = Field(2.0, gt=1)
    """Largest weight."""
    low: float = Field(0.0, ge=0, lt=1)
    """Smallest weight that is not masked."""

    @model_validator(mode="after")
    def _low_is_for_masks(self) -> "Correction":
        if self.low and self.type == "truncate":
            raise ValueError("low: only `type: mask` has a smallest weight; leave it out, or mask")
        return self


class KlPenalty(Config):
    """Keeps the policy near the model that the stage began with."""

    coefficient: float = Field(0.01, gt=0)
    """Weight beside the surrogate."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """With d = log p - log p_reference: k1 = d, k2 = d^2 / 2, k3 = exp(-d) + d - 1 (Schulman 2020)."""


class VerifiedReward(Config):
    """1 for an answer that the task takes for right, 0 for any other."""

    type: Literal["verified"] = "verified"
    weight: float = 1.0
    """Factor in the sum of rewards."""


class GradedReward(Config):
    """The task's own partial credit, which a policy may learn to collect with answers that are never right."""

    type: Literal["graded"] = "graded"
    weight: float = 1.0
    """Factor in the sum of rewards."""


class ExactMatchReward(Config):
    """1 for the very answer, 0 for any other text."""

    type: Literal["exact_match"] = "exact_match"
    weight: float = 1.0
    """Factor in the sum of rewards."""


class NumericReward(Config):
    """1 if the last number of the completion is the answer's number."""

    type: Literal["numeric"] = "numeric"
    weight: float = 1.0
    """Factor in the sum of rewards."""
    tolerance: float = Field(1e-6, ge=0)
    """Largest difference that counts as equal, as a share of the answer."""


class FunctionReward(Config):
    """A Python function: `f(prompts, completions, completion_ids, **columns) -> list[float | None]`, also async."""

    type: Literal["function"] = "function"
    path: str = Field(pattern=r"^[^:]+:[A-Za-z_][A-Za-z0-9_]*$")
    """`package.module:name` or `folder/file.py:name`. The file's contents are identity too."""
    weight: float = 1.0
    """Factor in the sum of rewards."""
    timeout_seconds: float = Field(60.0, gt=0)
    """How long one call may take."""
    on_failure: Literal["stop", "none"] = "stop"
    """If a call raises or takes too long: the run stops, or the function has no say on these completions."""


RewardConfig = Annotated[
    VerifiedReward | GradedReward | ExactMatchReward | NumericReward | FunctionReward, Field(discriminator="type")
]


class RlConfig(Config):
    """Policy optimisation on a verifiable task, with rollouts from vLLM and their routing replayed
    (R3, arXiv 2510.11370)."""

    type: Literal["rollouts"] = "rollouts"
    task: TaskConfig
    """The task that prompts come from."""
    rewards: tuple[RewardConfig, ...] = Field((VerifiedReward(),), min_length=1)
    """What a completion earns: their weighted sum."""
    algorithm: AlgorithmConfig = Dapo()
    """The objective."""
    scale_rewards: Literal["group", "batch", "none"] | None = None
    """What advantages are divided by: the standard deviation of the group's rewards, of the batch's, or nothing.
    Default `group`, with dr_grpo `none`."""
    correction: Correction | None = None
    """Importance weights between the engine and the trainer; needed where rollouts may be stale."""
    kl: KlPenalty | None = None
    """Penalty on leaving the model that the stage began with."""
    steps: int = Field(8, ge=1)
    """Rollout batches that are learnt from."""
    prompts_per_step: int = Field(32, ge=1)
    """Distinct problems per batch."""
    num_generations: int = Field(8, ge=2)
    """Completions per problem; their rewards are compared with one another."""
    max_tokens: int = Field(16, ge=1)
    """Longest completion."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature of the rollouts."""
    routing: Literal["off", "r2", "r3", "auto"] = "r3"
    """Whose expert choices the trainer replays in its updates: its own of before the batch (`r2`), the engine's (`r3`),
    nobody's (`off`), or what suits how far off-policy the run is (`auto`)."""
    max_staleness: int = Field(0, ge=0)
    """By how many updates the policy that sampled a batch lags behind the one that learns from it. With 1 and more the
    engine samples while the trainer trains."""
    mini_steps: int = Field(1, ge=1)
    """Optimiser steps per batch of rollouts."""
    micro_batch_size: int = Field(64, ge=1)
    """Sequences per forward pass of the trainer."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    rollout_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type the rollout engine computes in."""
    refresh_tolerance: float = Field(1e-3, gt=0)
    """Largest difference of log-probabilities between engine and trainer that a weight refresh may leave, nats (float32
    alone: in bfloat16 their k3 has to be below 0.02 nats)."""
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=1e-4, warmup_steps=0, weight_decay=0.0, schedule="constant"
    )
    """The optimiser."""
    seed: Seed = 0
    """Seeds problems and sampling."""

    @property
    def scaling(self) -> Literal["group", "batch", "none"]:
        """`scale_rewards`, the default filled in."""
        return self.scale_rewards or ("none" if self.algorithm.type == "dr_grpo" else "group")

    @model_validator(mode="after")
    def _mini_steps_have_sequences(self) -> "RlConfig":
        sequences = self.prompts_per_step * self.num_generations
        if self.mini_steps > sequences:
            raise ValueError(f"mini_steps: {self.mini_steps} is more than a step's {sequences} sequences")
        return self

    @model_validator(mode="after")
    def _staleness_is_corrected(self) -> "RlConfig":
        if self.max_staleness and not self.correction:
            raise ValueError(
                f"max_staleness: rollouts that are {self.max_staleness} updates old need a `correction`, "
                "or their off-policyness goes into the gradient unseen"
            )
        if self.max_staleness >= self.steps:
            raise ValueError(f"max_staleness: {self.max_staleness} leaves nothing to wait for in {self.steps} steps")
        return self


class DpoConfig(Config):
    """Learn from pairs of a better and a worse answer, without rollouts (DPO, arXiv 2305.18290)."""

    type: Literal["dpo"] = "dpo"
    pairs: Annotated[str, EXECUTION]
    """A JSONL file of objects with `prompt`, `chosen` and `rejected`. Its contents are identity, not where it lies."""
    beta: float = Field(0.1, gt=0)
    """How strongly the policy is kept near the model that the stage began with."""
    epochs: int = Field(1, ge=1)
    """Passes over the pairs."""
    batch_size: int = Field(16, ge=1)
    """Pairs per optimiser step."""
    micro_batch_size: int = Field(16, ge=1)
    """Pairs per forward pass."""
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=1e-5, warmup_steps=0, weight_decay=0.0, schedule="constant"
    )
    """The optimiser."""
    seed: Seed = 0
    """Seeds the order of pairs."""


def _kind(value: Any) -> str:
    return str(value.get("type", "rollouts") if isinstance(value, dict) else getattr(value, "type", "rollouts"))


AnyRl = Annotated[Annotated[RlConfig, Tag("rollouts")] | Annotated[DpoConfig, Tag("dpo")], Discriminator(_kind)]
"""What an rl stage may be; rollouts where nothing is said."""
