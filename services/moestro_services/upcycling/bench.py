"""`moestro bench upcycling`: which way of making experts wins, on one budget, from the same converged seeds.

On the quickstart's domains, from several random seeds. Everything trained is an artifact in the home's folder `bench`:
a run that was stopped goes on, and a finished one only measures again.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from moestro.cluster import Cluster
from moestro.config import ModelConfig, PretrainSeed, load_lifecycle
from moestro.errors import StoppedError
from moestro_flows.home import Home
from moestro_services.upcycling.arms import Arms, Outcome, Scale
from moestro_services.upcycling.clock import step_seconds
from moestro_services.upcycling.lab import Lab, Workshop
from moestro_services.upcycling.rivals import (
    BEST_BRANCH,
    DENSE_CLOCK,
    RECIPE,
    SEED,
    SPARSE,
    UNTRAINED,
    dense_by_clock,
    rivals,
)
from moestro_services.upcycling.statistics import Interval, ratios

CONFIG = Path("examples/quickstart.yaml")
SEEDS = (0, 1, 2)
MODEL = ModelConfig(
    vocab_size=1024, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=512,
)  # fmt: skip
"""A seed small enough to be trained on the quickstart's domains until it hardly learns any more."""
SEED_STEPS, SEED_BATCH = 6000, 16
MAX_WAITING = 64
"""Threads that wait for stages; all rivals of all seeds must fit, for some wait for others."""
Found = TypeVar("Found")
Opening = Callable[[], AbstractContextManager[Workshop]]
Table = Mapping[str, Sequence[Outcome]]
"""By rival, one outcome per random seed."""
BOUNDS = (
    (RECIPE, SEED, 0.97),
    (RECIPE, BEST_BRANCH, 0.95),
    (RECIPE, DENSE_CLOCK, 1.0),
    (RECIPE, SPARSE, 1.0),
    (UNTRAINED, SEED, 1.0),
)
"""Whose perplexity, by whose, at most."""
CONVERGED = 0.03
"""Largest share by which the loss of a converged seed falls over the last fifth of its steps, in which its learning
rate falls too: that alone lowers a loss."""


@dataclass(frozen=True)
class Measured:
    """What the table is made of."""

    table: Table
    steps: Mapping[str, float]
    """Seconds of a training step, by kind of work."""
    flatness: Sequence[float]
    """By random seed, by which share the seed's training loss fell over its last fifth."""


def bench() -> dict[str, Any]:
    """The first run trains everything; a later one only measures again."""
    return report(measure(workshop_here, full_scale(), SEEDS))


def full_scale(seed_steps: int = SEED_STEPS) -> Scale:
    """The quickstart's domains, and a seed that converges on them in its standard number of steps."""
    lifecycle = load_lifecycle(CONFIG)
    assert isinstance(lifecycle.seed, PretrainSeed)
    training = lifecycle.seed.training.model_copy(update={"steps": seed_steps, "batch_size": SEED_BATCH})
    seed = lifecycle.seed.model_copy(update={"model": MODEL, "training": training})
    return Scale(lifecycle.model_copy(update={"seed": seed}), branch_steps=600, tune_steps=600)


def measure(opened: Opening, scale: Scale, seeds: Sequence[int]) -> Measured:
    """Every rival from every random seed, and the best branch of each. Steps are timed while no workshop is open."""
    with opened() as workshop:
        table = on_all_seeds(workshop, scale, seeds, rivals)
        seed_models = on_all_seeds(workshop, scale, seeds, lambda arms: {SEED: lambda: arms.seed})[SEED]
        tokens = token_folders(workshop, scale)
    steps = clock(tokens, scale, [outcome for outcomes in table.values() for outcome in outcomes])
    with opened() as workshop:
        table |= on_all_seeds(workshop, scale, seeds, lambda arms: {DENSE_CLOCK: lambda: dense_by_clock(arms, steps)})
    by_seed = [{name: outcomes[number] for name, outcomes in table.items()} for number in range(len(seeds))]
    table[BEST_BRANCH] = [_best_branch(outcomes) for outcomes in by_seed]
    return Measured(table, steps, [model.record.result["loss_flatness"] for model in seed_models])


def clock(tokens: Mapping[str, Path], scale: Scale, outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Seconds of a step by kind of work, measured once per home."""
    return step_seconds(outcomes, tokens, scale, Home.current().path / "bench")


def token_folders(workshop: Workshop, scale: Scale) -> dict[str, Path]:
    """By domain, the tokens of the first random seed."""
    arms = Arms(Lab(workshop, 0), scale)
    return {name: arms.tokens[name].path for name in scale.domains}


@contextmanager
def workshop_here() -> Iterator[Workshop]:
    """A workshop in the home's folder `bench`, with a cluster that is started in place and ends with the block."""
    cluster = Cluster()
    cluster.connect()
    try:
        yield Workshop(Home.current().path / "bench", cluster, tell)
    finally:
        cluster.shutdown()


def on_all_seeds(
    workshop: Workshop,
    scale: Scale,
    seeds: Sequence[int],
    wanted: Callable[[Arms], Mapping[str, Callable[[], Found]]],
) -> dict[str, list[Found]]:
    """What is `wanted`, by name, one per random seed; as many stages side by side as there are cores.

    Raises the error of the stage that failed first, not those of the stages that it stopped; the workshop begins
    nothing more then.
    """
    with ThreadPoolExecutor(max_workers=MAX_WAITING) as pool:
        try:
            running = [
                {name: pool.submit(make) for name, make in wanted(Arms(Lab(workshop, seed), scale)).items()}
                for seed in seeds
            ]
            found = [{name: future.result() for name, future in one.items()} for one in running]
        except BaseException as error:  # on Ctrl-C too, nobody waits for what is running
            workshop.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, StoppedError) and workshop.failure is not None:
                raise workshop.failure from None
            raise
    return {name: [one[name] for one in found] for name in found[0]}


def report(measured: Measured) -> dict[str, Any]:
    """The table, its bounds and notes."""
    table = measured.table
    domains = list(table[SEED][0].losses)
    flattest = max(measured.flatness)
    return {
        "title": f"Recipes on one budget, {len(table[SEED])} random seeds",
        "columns": ["rival", *domains, "perplexity (geometric mean)", "by the seed's", "PFLOP", "wall clock, s"],
        "rows": [_row(name, measured, domains) for name in table],
        "bounds": [
            {
                "what": "share by which the seeds' training loss fell over their last fifth, the most",
                "value": flattest,
                "limit": f"<= {CONVERGED}",
                "ok": flattest <= CONVERGED,
            },
            *(_bound(table, *bound) for bound in BOUNDS),
        ],
        "notes": [
            "Held-out loss by domain in nats per token, means over random seeds; ±: half a 95% interval (Student's t).",
            "FLOPs are model FLOPs of training after the seed.",
            "Equal FLOPs: those of BTX as published, for every mixture too, whose tuning takes what its branches left.",
            "Wall clock: branches side by side, a core each; steps by what one takes, timed in turn and alone: "
            + ", ".join(f"{kind} {seconds:.3f} s" for kind, seconds in measured.steps.items())
            + ".",
            "Best single branch: the one with the lowest geometric mean over all domains.",
        ],
    }


def tell(line: str) -> None:
    """What was made or found, to who watches."""
    sys.stderr.write(f"{line}\n")


def _best_branch(outcomes: Mapping[str, Outcome]) -> Outcome:
    branches = [outcome for name, outcome in outcomes.items() if name.startswith("branch ")]
    return min(branches, key=lambda outcome: outcome.perplexity)


def _row(name: str, measured: Measured, domains: Sequence[str]) -> list[str]:
    outcomes, seeds = measured.table[name], measured.table[SEED]
    perplexities = [outcome.perplexity for outcome in outcomes]
    return [
        name,
        *(str(Interval.of([outcome.losses[domain] for outcome in outcomes])) for domain in domains),
        str(Interval.of(perplexities)),
        str(ratios(perplexities, [outcome.perplexity for outcome in seeds])),
        f"{Interval.of([outcome.flops / 1e15 for outcome in outcomes]).mean:.3f}",
        f"{Interval.of([outcome.seconds(measured.steps) for outcome in outcomes]).mean:.0f}",
    ]


def _bound(table: Table, one: str, other: str, limit: float) -> dict[str, Any]:
    ratio = ratios(*([outcome.perplexity for outcome in table[name]] for name in (one, other)))
    return {
        "what": f"{one}, by {other} ({ratio})",
        "value": ratio.mean,
        "limit": f"<= {limit}",
        "ok": ratio.mean <= limit,
    }
