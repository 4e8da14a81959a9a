"""The stages, one line each: what they are called, which config they take, and the pure function that does the work.

A stage is `function(config, **inputs, job=job) -> result`: it fills `job.out` and returns its key figures as JSON
values. Its inputs are artifacts, or, where `per_domain` has them, mappings of names to artifacts; those that `optional`
has may be left out, or be empty. `version` is the stage's semantic version: raise it when the same config and inputs
would give another result. `sources` names a function `(config) -> {name: fingerprint}` that identifies material from
outside the store. `on_cluster` stages train; they run as Ray tasks. `background` stages measure: nothing waits for
them, so they take the cores that others leave idle.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moestro import config
from moestro.artifacts import fingerprint


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of the lifecycle."""

    version: str
    config: Any
    function: str
    inputs: tuple[str, ...] = ()
    per_domain: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    sources: str = ""
    on_cluster: bool = False
    background: bool = False
    needs_engine: bool = False

    def load(self) -> Callable[..., dict[str, Any]]:
        """The stage's function; imports what it needs only now."""
        return _resolve(self.function)


STAGES: dict[str, Stage] = {
    "corpus": Stage(
        version="1",
        config=config.CorpusConfig,
        function="moestro.data.corpus:corpus",
        sources="moestro.data.sources:identify",
    ),
    "seed": Stage(
        version="1",
        config=config.SeedConfig,
        function="moestro.seeding:seed",
        inputs=("corpora",),
        per_domain=("corpora",),
        optional=("corpora",),
        sources="moestro.models.sources:identify",
        on_cluster=True,
    ),
    "tokens": Stage(
        version="1", config=config.TokensConfig, function="moestro.data.tokens:tokens", inputs=("corpus", "seed")
    ),
    "branch": Stage(
        version="1",
        config=config.AnyBranch,
        function="moestro.branching:branch",
        inputs=("seed", "tokens", "general"),
        per_domain=("general",),
        optional=("tokens", "general"),
        sources="moestro.models.sources:identify",
        on_cluster=True,
    ),
    "mix": Stage(
        version="1",
        config=config.MixConfig,
        function="moestro.mixing:mix",
        inputs=("seed", "branches", "tokens"),
        per_domain=("branches", "tokens"),
        optional=("branches", "tokens"),
    ),
    "append": Stage(
        version="1",
        config=config.AppendConfig,
        function="moestro.mixing:append",
        inputs=("model", "branch", "tokens"),
        per_domain=("tokens",),
        optional=("tokens",),
    ),
    "remove": Stage(version="1", config=config.RemoveConfig, function="moestro.mixing:remove", inputs=("model",)),
    "tune": Stage(
        version="1",
        config=config.TuneConfig,
        function="moestro.tuning:tune",
        inputs=("model", "tokens"),
        per_domain=("tokens",),
        on_cluster=True,
    ),
    "rl": Stage(
        version="3",
        config=config.AnyRl,
        function="moestro.rl:rl",
        inputs=("model",),
        sources="moestro.data.rewards:identify",
        needs_engine=True,
    ),
    "compress": Stage(
        version="1",
        config=config.CompressConfig,
        function="moestro.compression:compress",
        inputs=("model", "tokens"),
        per_domain=("tokens",),
    ),
    "evaluate": Stage(
        version="2",
        config=config.EvaluateConfig,
        function="moestro.evaluation:evaluate",
        inputs=("model", "tokens"),
        per_domain=("tokens",),
        background=True,
    ),
    "profile": Stage(
        version="1",
        config=config.ProfileConfig,
        function="moestro.profiling:profile",
        inputs=("model", "tokens"),
        per_domain=("tokens",),
        background=True,
    ),
    "steer": Stage(
        version="1",
        config=config.AnyProfile,
        function="moestro.steering:steer",
        inputs=("model", "tokens"),
        per_domain=("tokens",),
    ),
    "deploy": Stage(
        version="2",
        config=config.DeployConfig,
        function="moestro.deployment:deploy",
        inputs=("model", "tokens"),
        per_domain=("tokens",),
    ),
}


def flatten(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs by role, one level deep: `{"seed": s, "branches": {"code": b}}` -> `{"seed": s, "branches/code": b}`."""
    flat: dict[str, Any] = {}
    for role, value in inputs.items():
        if isinstance(value, Mapping):
            flat.update({f"{role}/{name}": item for name, item in value.items()})
        else:
            flat[role] = value
    return flat


def in_order(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """`inputs` with every mapping sorted by name: order is no part of identity, so no stage may see another one."""
    return {
        role: dict(sorted(value.items())) if isinstance(value, Mapping) else value for role, value in inputs.items()
    }


def source_fingerprints(stage: str, stage_config: config.Config) -> dict[str, str]:
    """Identity of what the stage reads from outside the store, by role; raises `InputError` if it is missing."""
    function = STAGES[stage].sources
    return {f"source/{name}": value for name, value in _resolve(function)(stage_config).items()} if function else {}


def identify(stage: str, stage_config: config.Config, inputs: Mapping[str, str]) -> str:
    """Fingerprint of what `stage` would make of `inputs` (fingerprints by flattened role, sources included)."""
    return fingerprint(stage, STAGES[stage].version, stage_config.identity(), inputs)


def _resolve(reference: str) -> Any:
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)
