"""Everything that can be configured, importable without torch, vLLM or Ray.

`base` has the class all configs share, `data`, `training` and `stages` one config per concern, `lifecycle` the
whole walk, `load` reads YAML. What a config holds is identity and enters fingerprints; `Resources` never does.
"""

from moestro.config.base import Config
from moestro.config.data import (
    BuiltinSource,
    CorpusConfig,
    DataConfig,
    DomainConfig,
    FileSource,
    Source,
    SplitConfig,
    TaskConfig,
    TaskSource,
    TokensConfig,
)
from moestro.config.lifecycle import BranchesConfig, LifecycleConfig, Resources
from moestro.config.load import load_lifecycle, read_yaml, validate
from moestro.config.stages import (
    BranchConfig,
    CompressConfig,
    DeployConfig,
    EvaluateConfig,
    ImportSeed,
    MixConfig,
    ModelConfig,
    ParityGate,
    PretrainSeed,
    ProfileConfig,
    RlConfig,
    SeedConfig,
    TuneConfig,
)
from moestro.config.training import OptimizerConfig, TrainingConfig

__all__ = [
    "BranchConfig",
    "BranchesConfig",
    "BuiltinSource",
    "CompressConfig",
    "Config",
    "CorpusConfig",
    "DataConfig",
    "DeployConfig",
    "DomainConfig",
    "EvaluateConfig",
    "FileSource",
    "ImportSeed",
    "LifecycleConfig",
    "MixConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParityGate",
    "PretrainSeed",
    "ProfileConfig",
    "Resources",
    "RlConfig",
    "SeedConfig",
    "Source",
    "SplitConfig",
    "TaskConfig",
    "TaskSource",
    "TokensConfig",
    "TrainingConfig",
    "TuneConfig",
    "load_lifecycle",
    "read_yaml",
    "validate",
]
