"""Configs of what seed, branch and tune share: the optimiser, its schedule, and the batch."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from moestro.config.base import EXECUTION, Config

MomentDecay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Config):
    """AdamW with a warm-up and a decay."""

    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    min_learning_rate_ratio: float = Field(0.1, ge=0, le=1)
    """Learning rate at the end, as a share of the peak."""
    warmup_steps: int = Field(20, ge=0)
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after the warm-up."""
    weight_decay: float = Field(0.1, ge=0)
    """Applied to matrices only, never to norms, biases and embeddings."""
    betas: tuple[MomentDecay, MomentDecay] = (0.9, 0.95)
    """AdamW's moment decays."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this global norm."""


class TrainingConfig(Config):
    """One training run: how many steps, on how much, how exactly."""

    steps: int = Field(ge=1)
    """Optimiser steps."""
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
    seed: int = 0
    """Seeds initialisation and the order of data."""

    @model_validator(mode="after")
    def _batch_divides(self) -> "TrainingConfig":
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation: {self.accumulation} does not divide batch_size ({self.batch_size})")
        return self
