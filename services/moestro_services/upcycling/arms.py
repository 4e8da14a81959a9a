"""What each rival of `moestro bench upcycling` does with a converged seed, one method each.

All of one random seed start from the same seed model and read the same text in the same batches of `Scale`. A budget is
that of BTX as published: its branches and the tuning of its mixture. Who trains otherwise gets the same model FLOPs,
or, where it says so, the same wall clock, in which the branches are trained side by side.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moestro.artifacts import Artifact
from moestro.config import (
    BranchConfig,
    Config,
    EvaluateConfig,
    GlobalBatchLoss,
    LifecycleConfig,
    MixConfig,
    OptimizerConfig,
    PretrainSeed,
    TrainingConfig,
    TuneConfig,
    validate,
)
from moestro.evaluation.domain_ensembles import posterior_ensembles
from moestro.models.files import read_config
from moestro.models.layouts import routed_experts
from moestro_services.upcycling.lab import Lab

Trainable = Literal["all", "ffn"]
ENSEMBLES = (1, 2)
"""How many branches predict together in Branch-Train-Merge: one pass over each tells both."""
DENSE, FFN_ONLY = "dense", "dense, FFN only"
"""Kinds of work, beside those of mixtures."""


@dataclass(frozen=True)
class Scale:
    """How much is trained."""

    lifecycle: LifecycleConfig
    """Whose domains, tokens and seed model are taken."""
    branch_steps: int
    """Of the published recipe; others train for a part of them."""
    tune_steps: int
    """Of the published recipe: what it spends with its branches is everyone's budget."""
    batch_size: int = 16
    sequence_length: int = 256
    learning_rate: float = 1e-3
    """Of everything that continues from the seed."""
    held_out_tokens: int = 32_768
    """Per domain."""

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains."""
        return tuple(domain.name for domain in self.lifecycle.data.domains)


@dataclass(frozen=True)
class Work:
    """A training run, as far as its time is concerned."""

    kind: str
    """Runs of one kind take the same time per step."""
    steps: int
    side_by_side: bool
    """Whether it is a branch, all of which train at the same time."""
    model: Path
    """The result, for whoever measures a step."""

    @classmethod
    def of(cls, trained: Artifact) -> "Work":
        """That which made `trained`."""
        steps = trained.record.result["steps"]
        if trained.stage == "branch":
            return cls(FFN_ONLY if trained.record.config["trainable"] == "ffn" else DENSE, steps, True, trained.path)
        parsed = read_config(trained.path)
        kind = f"{routed_experts(parsed)} experts top-{parsed['num_experts_per_tok']}"
        return cls(kind, steps, False, trained.path)


@dataclass(frozen=True)
class Outcome:
    """What one rival reached from one random seed."""

    losses: Mapping[str, float]
    """Held-out loss by domain, nats per token."""
    flops: float = 0.0
    """Model FLOPs of training, after the seed."""
    work: tuple[Work, ...] = ()
    """Its training runs after the seed."""

    @property
    def perplexity(self) -> float:
        """Geometric mean over domains."""
        return math.exp(sum(self.losses.values()) / len(self.losses))

    def seconds(self, steps: Mapping[str, float]) -> float:
        """Wall clock of training with as many workers as branches, where `steps` says what a step of a kind takes."""
        side_by_side = [steps[work.kind] * work.steps for work in self.work if work.side_by_side]
        return max(side_by_side, default=0.0) + sum(
            steps[work.kind] * work.steps for work in self.work if not work.side_by_side
        )


@dataclass
class Arms:
    """The rivals of one random seed. Nothing is kept here: the lab makes each result once."""

    lab: Lab
    scale: Scale

    @property
    def corpora(self) -> dict[str, Artifact]:
        """The domains' text, the same for every random seed."""
        configs = self.scale.lifecycle.data.corpus_configs()
        return {name: self.lab.run("corpus", config, name) for name, config in configs.items()}

    @property
    def seed(self) -> Artifact:
        """The dense model that all start from."""
        lifecycle = self.scale.lifecycle
        config = lifecycle.seed
        if isinstance(config, PretrainSeed):
            training = config.training.model_copy(update={"seed": self.lab.seed})
            config = config.model_copy(update={"training": training})
        return self.lab.run("seed", config, corpora={name: self.corpora[name] for name in lifecycle.seed_text()})

    @property
    def tokens(self) -> dict[str, Artifact]:
        """By domain."""
        config = self.scale.lifecycle.tokens
        return {
            name: self.lab.run("tokens", config, name, corpus=text, seed=self.seed)
            for name, text in self.corpora.items()
        }

    def training(self, *, rate: float = 1.0, **budget: float) -> TrainingConfig:
        """How everything is trained that continues from the seed, at `rate` times the scale's learning rate."""
        scale = self.scale
        return TrainingConfig(
            **budget,
            batch_size=scale.batch_size,
            sequence_length=scale.sequence_length,
            dtype="bfloat16",
            seed=self.lab.seed,
            optimizer=OptimizerConfig(
                learning_rate=rate * scale.learning_rate, warmup_steps=min(10, int(budget.get("steps", 10)))
            ),
        )

    def branches(self, trainable: Trainable, *, part: float = 1.0, rate: float = 1.0) -> dict[str, Artifact]:
        """One copy of the seed per domain, trained on it alone, for `part` of the scale's steps at `rate` times its
        learning rate."""
        training = self.training(steps=math.ceil(part * self.scale.branch_steps), rate=rate)
        return {
            name: self.lab.run(
                "branch",
                BranchConfig(domain=name, training=training, trainable=trainable),
                f"{name}, {trainable}, {training.steps} steps",
                seed=self.seed,
                tokens=tokens,
            )
            for name, tokens in self.tokens.items()
        }

    def dense(self, what: str, **budget: float) -> Artifact:
        """The seed trained on all domains in equal parts."""
        first, *others = self.tokens
        config = BranchConfig(
            domain=first,
            training=self.training(**budget),
            trainable="all",
            general_share=len(others) / len(self.tokens),
        )
        general = {name: self.tokens[name] for name in others}
        return self.lab.run("branch", config, what, seed=self.seed, tokens=self.tokens[first], general=general)

    def mix(self, what: str, branches: Mapping[str, Artifact], **fields: Any) -> Artifact:
        """One MoE of `branches`."""
        config: MixConfig = validate(MixConfig, fields, where=what)
        return self.lab.run("mix", config, what, seed=self.seed, branches=branches, tokens=self.tokens)

    def tune(self, what: str, model: Artifact, training: TrainingConfig, **fields: Any) -> Artifact:
        """The MoE trained on all domains."""
        config = TuneConfig(training=training, **({"losses": (GlobalBatchLoss(),)} | fields))
        return self.lab.run("tune", config, what, model=model, tokens=self.tokens)

    def outcome(self, what: str, model: Artifact, *trained: Artifact) -> Outcome:
        """Held-out losses of `model`, whose training was that of `trained`: branches side by side, the rest after."""
        config: Config = EvaluateConfig(
            sequence_length=self.scale.sequence_length, max_tokens=self.scale.held_out_tokens
        )
        losses = self.lab.run("evaluate", config, what, model=model, tokens=self.tokens).record.result["held_out_loss"]
        return Outcome(losses, *_training(trained))

    def ensemble(self, branches: Mapping[str, Artifact], top_k: int) -> Outcome:
        """Branch-Train-Merge: `top_k` branches predict together, by each domain's probability given the text so far."""
        workshop, key = self.lab.workshop, tuple(branch.fingerprint for branch in branches.values())
        with workshop.in_turn:
            if key not in workshop.ensembles:
                workshop.ensembles[key] = posterior_ensembles(
                    {name: branch.path for name, branch in branches.items()},
                    {name: tokens.path for name, tokens in self.tokens.items()},
                    top_k=ENSEMBLES,
                    sequence_length=self.scale.sequence_length,
                    max_tokens=self.scale.held_out_tokens,
                )
        return Outcome(workshop.ensembles[key][top_k], *_training(tuple(branches.values())))


def flops_of(*trained: Artifact) -> float:
    """Model FLOPs of their training."""
    return sum(artifact.record.result["flops"] for artifact in trained)


def _training(trained: Sequence[Artifact]) -> tuple[float, tuple[Work, ...]]:
    """Model FLOPs and work."""
    return flops_of(*trained), tuple(Work.of(item) for item in trained)
