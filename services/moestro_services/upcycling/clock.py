"""What a training step takes, measured alone: wall clocks of rivals that trained side by side say little.

All kinds of steps are taken in turn in one process on one thread, as the workers have one each, and kept in the
home's folder `bench`, so that a run again has the same budgets.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
from pydantic import TypeAdapter

from moestro.artifacts import fingerprint
from moestro.branching.training import is_feed_forward_weight
from moestro.config import RoutingLossConfig
from moestro.data.packed import Batch, Mixture, PackedTokens
from moestro.models.checkpoint import load_model
from moestro.models.files import read_origins
from moestro.training.attention import training_attention
from moestro.training.linear import training_linear
from moestro.training.routing_losses import Context, routing_objective
from moestro_kernels import experts_mlp
from moestro_kernels.timing import interleaved
from moestro_services.bench_training_step import moestro_step
from moestro_services.upcycling.arms import FFN_ONLY, Outcome, Scale

ROUNDS = 15
BATCHES = 4
_STORED = TypeAdapter(dict[str, float])


@dataclass(frozen=True)
class Timed:
    """A model whose steps are timed, and what it is trained with."""

    model: Path
    ffn_only: bool = False
    losses: tuple[RoutingLossConfig, ...] | None = None
    """Losses on its routing; None: trained without recording it."""
    accumulation: int = 1


def step_seconds(
    outcomes: Iterable[Outcome], tokens: Mapping[str, Path], scale: Scale, kept_in: Path
) -> dict[str, float]:
    """Seconds of a step by kind of work, medians; kept in the folder `kept_in` once they are measured.

    `tokens` are artifacts by domain.
    """
    kinds = {
        work.kind: Timed(work.model, ffn_only=work.kind == FFN_ONLY) for outcome in outcomes for work in outcome.work
    }
    return seconds_of(kinds, tokens, scale, kept_in, what="steps")


def seconds_of(
    kinds: Mapping[str, Timed], tokens: Mapping[str, Path], scale: Scale, kept_in: Path, *, what: str
) -> dict[str, float]:
    """Seconds of a step of each of `kinds`, medians of steps in turn; kept under the name `what` in `kept_in`."""
    measured = {"seed": scale.lifecycle.seed, "batch": scale.batch_size, "length": scale.sequence_length}
    file = kept_in / f"{what}-{fingerprint(what, '1', measured, {})}.json"
    known = _STORED.validate_json(file.read_bytes()) if file.is_file() else {}
    if not kinds.keys() <= known.keys():
        known = _measure(kinds, tokens, scale)
        file.write_text(json.dumps(known, indent=2) + "\n")
    return known


def _measure(kinds: Mapping[str, Timed], tokens: Mapping[str, Path], scale: Scale) -> dict[str, float]:
    packed = {name: PackedTokens.open(folder, "train") for name, folder in tokens.items()}
    mixture = Mixture(packed, scale.sequence_length, seed=0)
    batches = [mixture.batch(step, scale.batch_size) for step in range(BATCHES)]
    experts_mlp.register()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ExitStack() as stack:
            steps = {
                kind: _steps(timed, batches, tuple(mixture.domains), scale, stack)
                for kind, timed in sorted(kinds.items())
            }
            timings = interleaved(steps, seconds=0.0, min_rounds=ROUNDS)
    finally:
        torch.set_num_threads(threads)
    return {kind: timing.median for kind, timing in timings.items()}


def _steps(
    timed: Timed, batches: Sequence[Batch], domains: tuple[str, ...], scale: Scale, stack: ExitStack
) -> Callable[[], object]:
    """A function that trains the next step of a model."""
    model = load_model(timed.model).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not timed.ffn_only or is_feed_forward_weight(name))
    objective = None
    if timed.losses is not None:
        objective = routing_objective(timed.losses, Context(model, read_origins(timed.model), domains))
        stack.enter_context(objective.attached())
    stack.enter_context(training_attention(model, dtype=torch.bfloat16, positions=scale.sequence_length))
    stack.enter_context(training_linear(model, dtype=torch.bfloat16))
    step = moestro_step(model, torch.bfloat16, auxiliary=objective, accumulation=timed.accumulation)
    following = cycle(batches)
    return lambda: step(next(following))
