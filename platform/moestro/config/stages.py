"""One frozen config per stage. What is in them is identity: it enters the artifact's fingerprint."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from moestro.config.base import EXECUTION, Config
from moestro.config.data import DomainName, TaskConfig
from moestro.config.training import TrainingConfig


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
    """A task whose answers are checked, greedy and sampled ones."""
    problems: int = Field(128, ge=1)
    """Problems of the task (never among the training problems)."""
    num_samples: int = Field(4, ge=0)
    """Answers sampled per problem at temperature 1, beside the greedy one: their accuracy is what `rl` improves."""
    max_answer_tokens: int = Field(16, ge=1)
    """Longest answer."""


class ProfileConfig(Config):
    """Who routes where: measured after every stage whose result is an MoE."""

    sequence_length: int = Field(256, ge=8)
    """Length of the held-out windows."""
    max_tokens: int = Field(16_384, ge=256)
    """Held-out tokens per domain."""
