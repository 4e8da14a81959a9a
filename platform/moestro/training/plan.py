"""How many steps a run has: its budget in steps, and whether the rest of its config and its data fit it."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from moestro.artifacts import canonical_json, fingerprint, sync
from moestro.config import TrainingConfig
from moestro.data.packed import Mixture
from moestro.errors import ConfigError
from moestro.training import parallel
from moestro.training.auxiliary import Auxiliary
from moestro.training.flops import training_flops
from moestro.training.frozen_experts import FrozenExperts
from moestro.training.learning_rates import RateFactors
from moestro.training.state import model_fingerprint, nothing_trained, require_owner

PLAN = "plan.json"
TIMED_BATCHES = 2
"""After one that is not timed: it makes what later ones find."""
MORE_TEXT = "Give it more text, shorten the training, lower its share, or raise max_epochs."
"""What can be done where a domain runs out of data."""
TOLD_IN_FULL = 1e12
"""Numbers from here on are powers of ten in messages."""
OPTIMIZER_SAMPLE = 1 << 22
"""Parameters that the optimiser's share of a step is timed on."""


@dataclass(frozen=True)
class Plan:
    """What is known of a run before its first step."""

    steps: int
    """Optimiser steps."""
    flops_per_token: float
    """Model FLOPs, forward and backward."""
    owner: str
    """Whose the training state is: a fingerprint of all that decides the run's result."""


def make_plan(
    model: PreTrainedModel,
    mixture: Mixture,
    config: TrainingConfig,
    *,
    factors: RateFactors,
    auxiliary: Auxiliary | None,
    frozen: FrozenExperts | None,
    scratch: Path,
    time_batch: Callable[[int], object],
) -> Plan:
    """The plan for training what of `model` requires gradients.

    The budget makes, at least one step of: tokens: ceil(tokens / tokens of a batch); flops: the nearest number, by
    `training_flops`; minutes: by the time that `time_batch(number)`, which goes forward and backward through a batch,
    takes on this machine. That number is kept in `scratch`, so that a resumed run has the same; timing trains nothing
    and draws no random number.
    Raises `ConfigError` for a warm-up that is longer than the run, and for a domain that is repeated more than
    `max_epochs` times.
    """
    inputs = {
        "model": model_fingerprint(model),
        "data": canonical_json(mixture.identity()),
        "rates": canonical_json(asdict(factors)),
        "auxiliary": canonical_json(list(auxiliary.identity()) if auxiliary else []),
        "frozen experts": canonical_json(frozen.identity() if frozen else []),
    }
    flops = training_flops(model, config.sequence_length)
    tokens = config.batch_size * config.sequence_length
    if config.known_steps is not None:
        steps = config.known_steps
    elif config.flops is not None:
        steps = max(1, round(config.flops / (tokens * flops)))
    else:
        steps = _steps_in_time(model, config, time_batch, scratch / PLAN, fingerprint("plan", "1", config, inputs))
    _check_warm_up(config, steps)
    _check_epochs(mixture, config, steps)
    return Plan(steps, flops, fingerprint("training", "1", config, inputs | {"steps": str(steps)}))


def _check_warm_up(config: TrainingConfig, steps: int) -> None:
    warmup = config.optimizer.warmup_steps
    if warmup is not None and warmup > steps:
        raise ConfigError(
            f"training.optimizer.warmup_steps: {warmup} is more than the run's {_told(steps)} steps.",
            hint="Shorten the warm-up or raise the budget.",
        )


def shortage(mixture: Mixture, config: TrainingConfig, steps: int) -> str:
    """In which domain `steps` run out of data, by how much; empty where they do not."""
    epochs = mixture.epochs(steps, config.batch_size)
    name = max(epochs, key=lambda name: epochs[name])
    if epochs[name] <= config.max_epochs:
        return ""
    return (
        f"Domain {name!r} runs out of data: {_told(steps)} steps would go through its "
        f"{len(mixture.domains[name].ids):,} tokens {_told(epochs[name], 1)} times, training.max_epochs is "
        f"{config.max_epochs:g}."
    )


def _told(number: float, places: int = 0) -> str:
    return f"{number:,.{places}f}" if number < TOLD_IN_FULL else f"{number:.1e}"


def _check_epochs(mixture: Mixture, config: TrainingConfig, steps: int) -> None:
    if lack := shortage(mixture, config, steps):
        raise ConfigError(lack, hint=MORE_TEXT)


def _steps_in_time(
    model: PreTrainedModel, config: TrainingConfig, time_batch: Callable[[int], object], path: Path, owner: str
) -> int:
    """Steps that take `config.minutes`, from `path` if they are known already. Worker 0 decides for all."""
    known = json.loads(path.read_text()) if path.exists() else None
    if (known := parallel.broadcast(known)) is not None:
        require_owner(known["owner"], owner, path.parent)
        return int(known["steps"])
    assert config.minutes is not None
    seconds = _seconds_per_step(model, time_batch)
    steps: int = parallel.broadcast(max(1, int(config.minutes * 60 / seconds)))
    if parallel.rank() == 0:
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"steps": steps, "owner": owner}))
        sync(temporary)
        temporary.rename(path)
        sync(path.parent)
    return steps


def _seconds_per_step(model: PreTrainedModel, time_batch: Callable[[int], object]) -> float:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with nothing_trained(model):
        time_batch(0)
        started = time.monotonic()
        for number in range(1, TIMED_BATCHES + 1):
            time_batch(number)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        seconds = (time.monotonic() - started) / TIMED_BATCHES
    return seconds + _optimizer_seconds(sum(parameter.numel() for parameter in parameters))


def _optimizer_seconds(parameters: int) -> float:
    """What AdamW takes for that many parameters, from a sample of others."""
    sample = nn.Parameter(torch.zeros(min(parameters, OPTIMIZER_SAMPLE)))
    sample.grad = torch.zeros_like(sample)
    optimizer = torch.optim.AdamW([sample], fused=True)
    optimizer.step()
    started = time.monotonic()
    optimizer.step()
    return (time.monotonic() - started) * parameters / sample.numel()
