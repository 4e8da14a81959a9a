"""What a step that trains is going to do, in a few words."""

from moestro.config import BranchConfig, Config, ImportBranch, ImportSeed, PretrainSeed, TrainingConfig, TuneConfig


def outline(config: Config) -> str:
    """`409,600 tokens in 100 steps, ffn, 0.05 general text`; `imported`; empty for a step that does not train."""
    if isinstance(config, ImportSeed | ImportBranch):
        return "imported"
    if not isinstance(config, PretrainSeed | BranchConfig | TuneConfig):
        return ""
    parts = [_budget(config.training)]
    if not isinstance(config, PretrainSeed):
        parts.append(config.trainable)
    if isinstance(config, BranchConfig) and config.general_share:
        parts.append(f"{config.general_share:.3g} general text")
    if config.training.early_stopping:
        parts.append("or earlier")
    return ", ".join(parts)


def _budget(training: TrainingConfig) -> str:
    if training.steps is not None:
        return f"{training.steps * training.batch_size * training.sequence_length:,} tokens in {training.steps:,} steps"
    if training.tokens is not None:
        return f"{training.tokens:,} tokens"
    if training.flops is not None:
        return f"{training.flops:.3g} FLOPs"
    return f"{training.minutes:g} minutes"
