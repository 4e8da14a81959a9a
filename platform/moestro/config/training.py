"""Configs of what seed, branch and tune share: the optimiser, its schedule, and the batch."""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from moestro.config.base import EXECUTION, Config
from moestro.config.seeds import Seed

DEFAULT_WARMUP = 20

MomentDecay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Config):
    """AdamW with a warm-up and a decay."""

    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    min_learning_rate_ratio: float = Field(0.1, ge=0, le=1)
    """Learning rate at the end, as a share of the peak."""
    warmup_steps: int | None = Field(None, ge=0)
    """Steps of linear warm-up, not more than the run has; default 20, of which a shorter run takes what it has."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after the warm-up."""
    weight_decay: float = Field(0.1, ge=0)
    """Applied to matrices only, never to norms, biases and embeddings."""
    betas: tuple[MomentDecay, MomentDecay] = (0.9, 0.95)
    """AdamW's moment decays."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this global norm."""

    @property
    def warmup(self) -> int:
        """Steps of warm-up, the default filled in."""
        return DEFAULT_WARMUP if self.warmup_steps is None else self.warmup_steps


class EarlyStopping(Config):
    """Stop when the loss on held-out text no longer falls, and keep the weights of the best measurement."""

    every: int = Field(50, ge=1)
    """Steps between measurements."""
    patience: int = Field(3, ge=1)
    """Measurements in a row without an improvement after which training stops."""
    min_improvement: float = Field(0.0, ge=0)
    """Nats per token that count as an improvement only if they are exceeded."""
    max_tokens: int = Field(16_384, ge=256)
    """Held-out tokens per domain."""


BUDGETS = ("steps", "tokens", "flops", "minutes")


class TrainingConfig(Config):
    """One training run: for how long (exactly one of steps, tokens, flops and minutes), on how much, how exactly."""

    steps: int | None = Field(None, ge=1, lt=2**63)
    """Optimiser steps."""
    tokens: int | None = Field(None, ge=1, lt=2**63)
    """Training tokens, rounded up to whole batches."""
    flops: float | None = Field(None, gt=0)
    """Floating-point operations of the model's products, forward and backward, rounded to whole batches."""
    minutes: float | None = Field(None, gt=0, le=1e7)
    """Time to train on this machine, as a few batches before the first step foretell it. The number of steps then
    depends on the machine: it stands in the record, and `steps` with that number gives the same result anywhere."""
    batch_size: int = Field(16, ge=1)
    """Sequences per optimiser step."""
    accumulation: int = Field(1, ge=1)
    """Micro-batches per optimiser step; must divide `batch_size`."""
    sequence_length: int = Field(256, ge=8)
    """Tokens per sequence."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the forward and backward computation; weights and optimiser stay in float32."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimiser."""
    checkpoint_every: Annotated[int, EXECUTION] = Field(50, ge=1)
    """Steps between resumable training checkpoints. Not identity: resuming is the same as running."""
    log_every: int = Field(10, ge=1)
    """Steps between logged metrics."""
    seed: Seed = 0
    """Seeds initialisation and the order of data."""
    cross_document_attention: bool = True
    """Whether tokens see the documents before theirs in a packed sequence. If not, positions restart at each document
    and its first token is not predicted."""
    early_stopping: EarlyStopping | None = None
    """When to stop before the budget is used up; default never."""
    max_epochs: Annotated[float, EXECUTION] = Field(50.0, gt=0)
    """A domain whose text would be repeated more often is refused before the first step. Not identity: it changes no
    result."""

    @model_validator(mode="after")
    def _one_budget(self) -> "TrainingConfig":
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if not given:
            raise ValueError(f"a budget is missing: one of {', '.join(BUDGETS)}")
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are both budgets; keep one")
        return self

    @property
    def known_steps(self) -> int | None:
        """Optimiser steps, where the budget alone says how many: not in FLOPs or minutes."""
        if self.tokens is not None:
            return math.ceil(self.tokens / (self.batch_size * self.sequence_length))
        return self.steps

    @model_validator(mode="after")
    def _steps_suffice(self) -> "TrainingConfig":
        steps, warmup, stopping = self.known_steps, self.optimizer.warmup_steps, self.early_stopping
        if steps is not None and warmup is not None and warmup > steps:
            raise ValueError(f"optimizer.warmup_steps: {warmup} is more than the run's {steps} steps")
        if steps is not None and stopping and stopping.every >= steps:
            raise ValueError(
                f"early_stopping.every: {stopping.every} leaves one measurement, at the end of the run's {steps} "
                "steps, so nothing would stop it; measure more often, or leave early_stopping out"
            )
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> "TrainingConfig":
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation: {self.accumulation} does not divide batch_size ({self.batch_size})")
        return self
