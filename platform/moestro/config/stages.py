"""One frozen config per stage. What is in them is identity: it enters the artifact's fingerprint."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from moestro.config.base import EXECUTION, Config
from moestro.config.data import DomainName, TaskConfig
from moestro.config.seeds import Seed
from moestro.config.training import OptimizerConfig, TrainingConfig


class ModelConfig(Config):
    """The shape of a Llama-architecture model that is pre-trained from scratch."""

    vocab_size: int = Field(2048, ge=300)
    """Size of the BPE vocabulary trained on the same text."""
    hidden_size: int = Field(192, ge=32, multiple_of=32)
    """Width of the residual stream (multiple of 32, as vLLM's CPU kernels want)."""
    intermediate_size: int = Field(512, ge=32, multiple_of=32)
    """Width of the feed-forward network (multiple of 32)."""
    num_hidden_layers: int = Field(4, ge=1)
    """Layers."""
    num_attention_heads: int = Field(6, ge=1)
    """Query heads; must divide `hidden_size`."""
    num_key_value_heads: int = Field(2, ge=1)
    """Key and value heads; must divide `num_attention_heads`."""
    max_position_embeddings: int = Field(1024, ge=64)
    """Longest sequence."""
    tie_word_embeddings: bool = True
    """Share the embedding with the output head."""

    @model_validator(mode="after")
    def _heads_fit(self) -> "ModelConfig":
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"num_attention_heads: {self.num_attention_heads} does not divide {self.hidden_size}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: {self.num_key_value_heads} does not divide {self.num_attention_heads}"
            )
        if self.hidden_size // self.num_attention_heads % 2:
            raise ValueError(
                f"num_attention_heads: {self.num_attention_heads} makes heads of "
                f"{self.hidden_size // self.num_attention_heads}, rotary embeddings need an even number"
            )
        return self


class PretrainSeed(Config):
    """Pre-train a small seed on an equal mix of domains."""

    type: Literal["pretrain"] = "pretrain"
    model: ModelConfig = ModelConfig()
    """The model's shape."""
    training: TrainingConfig
    """The training run."""
    domains: Annotated[tuple[DomainName, ...] | None, EXECUTION] = Field(None, min_length=1)
    """Domains whose text it is trained on; all by default. Where they are named, the seed stays as it is when another
    domain joins. Their texts are identity, as the stage's inputs; this list by itself is not."""

    @model_validator(mode="after")
    def _sequences_fit(self) -> "PretrainSeed":
        if self.training.sequence_length > self.model.max_position_embeddings:
            raise ValueError(
                f"training.sequence_length: {self.training.sequence_length} is longer than "
                f"model.max_position_embeddings ({self.model.max_position_embeddings})"
            )
        return self


class ImportSeed(Config):
    """Take an existing dense checkpoint."""

    type: Literal["import"] = "import"
    path: Annotated[str, EXECUTION]
    """A local Hugging Face directory or a GGUF file, or `package:NAME` for the one an installed package carries.
    Where it lies is not identity: the files' contents are."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type the weights are stored in."""


SeedConfig = Annotated[PretrainSeed | ImportSeed, Field(discriminator="type")]


Share = Annotated[float, Field(ge=0, lt=1)]


class BranchConfig(Config):
    """Continue training a copy of the seed on one domain."""

    type: Literal["train"] = "train"
    domain: DomainName
    """The domain."""
    training: TrainingConfig
    """The training run."""
    trainable: Literal["all", "ffn"] = "ffn"
    """Which weights train: all, or the feed-forward networks alone (then nothing diverges that would be averaged)."""
    general_share: Share = 0.0
    """Share of the sequences that come from general text, all of its domains alike."""


class ImportBranch(Config):
    """Take an existing dense checkpoint, trained from the seed elsewhere, as a domain's branch."""

    type: Literal["import"] = "import"
    domain: DomainName
    """The domain."""
    path: Annotated[str, EXECUTION]
    """A local Hugging Face directory or a GGUF file, or `package:NAME` for the one an installed package carries.
    Where it lies is not identity: the files' contents are."""
    unify_vocabulary: bool = False
    """Accept a vocabulary that adds tokens to the seed's, or is padded further."""


AnyBranch = Annotated[BranchConfig | ImportBranch, Field(discriminator="type")]


class RlConfig(Config):
    """GRPO on a verifiable task with rollouts from vLLM and rollout routing replay (R3, arXiv 2510.11370)."""

    task: TaskConfig
    """The task whose answers are verified."""
    reward: Literal["verified", "graded"] = "verified"
    """`verified`: 1 for a right answer, 0 for any other; `graded`: the task's own partial credit, which a policy may
    learn to collect with answers that are never right."""
    steps: int = Field(8, ge=1)
    """Policy updates."""
    prompts_per_step: int = Field(32, ge=1)
    """Distinct problems per update."""
    num_generations: int = Field(8, ge=2)
    """Completions per problem; their rewards are compared with one another."""
    max_tokens: int = Field(16, ge=1)
    """Longest completion."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature of the rollouts."""
    routing: Literal["off", "r3"] = "r3"
    """`r3` replays the rollout engine's expert choices in the trainer."""
    clip: float = Field(0.2, gt=0)
    """PPO clipping range of the importance ratio."""
    mini_steps: int = Field(1, ge=1)
    """Optimiser steps per batch of rollouts."""
    micro_batch_size: int = Field(64, ge=1)
    """Sequences per forward pass of the trainer."""
    rollout_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type the rollout engine computes in."""
    refresh_tolerance: float = Field(1e-3, gt=0)
    """Largest difference of log-probabilities between engine and trainer that a weight refresh may leave (float32)."""
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=1e-4, warmup_steps=0, weight_decay=0.0, schedule="constant"
    )
    """The optimiser."""
    seed: Seed = 0
    """Seeds problems and sampling."""

    @model_validator(mode="after")
    def _mini_steps_have_sequences(self) -> "RlConfig":
        sequences = self.prompts_per_step * self.num_generations
        if self.mini_steps > sequences:
            raise ValueError(f"mini_steps: {self.mini_steps} is more than a step's {sequences} sequences")
        return self


class CompressConfig(Config):
    """Prune experts by router-weighted activation (REAP, arXiv 2510.13999)."""

    num_experts: int = Field(3, ge=1)
    """Experts that remain in each layer."""
    criterion: Literal["reap", "frequency", "gate"] = "reap"
    """`reap`: mean over an expert's tokens of gate times norm of its output; `frequency`: tokens; `gate`: gate mass."""
    calibration_tokens: int = Field(16_384, ge=256)
    """Training tokens per domain the criterion is measured on."""


class EvaluateConfig(Config):
    """What is measured after every stage."""

    sequence_length: int = Field(256, ge=8)
    """Length of the held-out windows."""
    max_tokens: int = Field(32_768, ge=256)
    """Held-out tokens per domain."""
    task: TaskConfig | None = None
    """A task whose greedy answers are checked for exact match."""
    problems: int = Field(128, ge=1)
    """Problems of the task (never among the training problems)."""
    max_answer_tokens: int = Field(16, ge=1)
    """Longest answer."""


class ProfileConfig(Config):
    """Who routes where: measured after every stage whose result is an MoE."""

    sequence_length: int = Field(256, ge=8)
    """Length of the held-out windows."""
    max_tokens: int = Field(16_384, ge=256)
    """Held-out tokens per domain."""


class ParityGate(Config):
    """The served model against transformers, before any traffic."""

    sequences: int = Field(4, ge=1)
    """Held-out sequences per domain."""
    sequence_length: int = Field(128, ge=8)
    """Their length."""
    max_logprob_difference: float = Field(1e-3, gt=0)
    """Largest allowed difference of a token's log-probability."""
    min_routing_agreement: float = Field(0.99, gt=0, le=1)
    """Smallest allowed share of (token, layer) pairs routed to the same experts."""


class DeployConfig(Config):
    """Serve the final checkpoint."""

    name: str = Field("assistant", pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}$")
    """Name under which the model is served and registered."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type vLLM computes in."""
    max_model_len: int = Field(512, ge=64)
    """Longest sequence served."""
    parity: ParityGate = ParityGate()
    """The gate."""
    sample_prompt: str = "Question: What is 12 + 7?\nAnswer:"
    """Asked over REST once the deployment stands."""

    @model_validator(mode="after")
    def _gate_fits(self) -> "DeployConfig":
        if self.parity.sequence_length >= self.max_model_len:
            raise ValueError("deploy.parity.sequence_length must be below deploy.max_model_len")
        return self
