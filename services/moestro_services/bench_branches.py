"""`moestro bench branches`: two branches on two workers against one after the other, and how soon a first step comes.

One thread per worker, on a cluster started in place. The number of steps is chosen so that a branch trains for
`BRANCH_SECONDS` on this machine. Variants run in interleaved rounds on workers that have run a branch before; every
run makes its branches anew, in a store of its own.
"""

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moestro.artifacts import Artifact, ArtifactStore, SilentReporter
from moestro.cluster import Cluster
from moestro.config import BranchConfig, ModelConfig, Resources, TrainingConfig
from moestro.execution import Step
from moestro_flows.home import Home
from moestro_kernels.timing import Timing, ratio

BRANCH_SECONDS = 32.0
"""A little more than the 30 s that a branch is to have at least."""
ROUNDS = 3
STARTS = 3
BRANCHES = 2
MIN_SPEEDUP = 1.7
MAX_START_SECONDS = 15.0
PROBE_STEPS = 20
MODEL = ModelConfig(
    vocab_size=2048, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=4,
)  # fmt: skip
TOKENS = 400_000
ONE = Resources(cpus=1)
ANY_EPOCHS = 1e6


class FirstStep(SilentReporter):
    """When the first step was reported, by the clock of `time.monotonic`."""

    def __init__(self) -> None:
        self.at = math.nan

    def progress(self, done: int, total: int, message: str = "") -> None:  # noqa: ARG002
        if math.isnan(self.at):
            self.at = time.monotonic()


class Branches:
    """Branches of a random seed, as many steps long as asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.inputs = _inputs(folder / "inputs")
        self.stores = 0

    def steps(self, count: int) -> list[Step]:
        """The two, which differ in the order of their data."""
        training = TrainingConfig(steps=count, checkpoint_every=count, log_every=count, max_epochs=ANY_EPOCHS)
        return [
            Step(
                "branch", BranchConfig(domain="text", training=training.model_copy(update={"seed": seed})), self.inputs
            )
            for seed in range(BRANCHES)
        ]

    def store(self) -> ArtifactStore:
        """An empty one."""
        self.stores += 1
        return ArtifactStore(self.folder / f"store-{self.stores}")


def bench(seconds: float = BRANCH_SECONDS, rounds: int = ROUNDS, starts: int = STARTS) -> dict[str, Any]:
    """Measure on two cores that should be idle: some ten minutes."""
    Home.current().prepare()
    with tempfile.TemporaryDirectory() as name:
        branches = Branches(Path(name))
        first_steps = [delay for _ in range(starts) for delay in cold_starts(branches)]
        with connected(warm=True) as cluster:
            count = steps_for(seconds, cluster, branches)
            taken, work = measured(cluster, branches, count, rounds)
    return report(first_steps, taken, work, count)


@contextmanager
def connected(*, warm: bool) -> Iterator[Cluster]:
    """A cluster with a core for each branch; its workers have imported what they need if `warm`."""
    cluster = Cluster(cpus=BRANCHES)
    cluster.connect(workers=BRANCHES if warm else 0)
    try:
        yield cluster
    finally:
        cluster.shutdown()


def cold_starts(branches: Branches) -> list[float]:
    """Seconds from handing in each of both branches at once to its first step, on workers that are yet to start."""
    reporters = [FirstStep() for _ in range(BRANCHES)]
    with connected(warm=False) as cluster:
        started = time.monotonic()
        _at_once(cluster, branches.store(), branches.steps(1), reporters)
    return [reporter.at - started for reporter in reporters]


def steps_for(seconds: float, cluster: Cluster, branches: Branches) -> int:
    """Steps that a branch trains for so long with; warms both workers."""
    made = _at_once(cluster, branches.store(), branches.steps(PROBE_STEPS), [SilentReporter()] * BRANCHES)
    slowest = max(float(artifact.record.result["seconds"]) for artifact in made)
    return max(1, math.ceil(seconds * PROBE_STEPS / slowest))


def measured(
    cluster: Cluster, branches: Branches, count: int, rounds: int
) -> tuple[dict[str, Timing], tuple[float, ...]]:
    """Wall time of each variant in every round, and the seconds of training of each branch run alone."""
    steps = branches.steps(count)
    work: list[float] = []

    def in_turn(store: ArtifactStore) -> None:
        made = [_run(cluster, store, step) for step in steps]
        work.extend(float(artifact.record.result["seconds"]) for artifact in made)

    variants = {
        "one worker": in_turn,
        "two workers": lambda store: _at_once(cluster, store, steps, [SilentReporter()] * BRANCHES),
        "one branch on two workers together": lambda store: _run(
            cluster, store, steps[0], ONE.model_copy(update={"branch_workers": BRANCHES})
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            store, started = branches.store(), time.monotonic()
            variants[name](store)
            seconds[name].append(time.monotonic() - started)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}, tuple(work)


def report(first_steps: Sequence[float], taken: dict[str, Timing], work: Sequence[float], count: int) -> dict[str, Any]:
    """The table and the bounds."""
    speedup = ratio(taken["one worker"], taken["two workers"]).median
    latest = max(first_steps)
    rows = [[name, _shown(timing.seconds)] for name, timing in taken.items()]
    return {
        "title": f"Two branches of {count} steps, one thread per worker",
        "columns": ["what", "seconds, median (least..most)"],
        "rows": [
            *rows,
            ["training alone, of one branch", _shown(work)],
            ["from submission to the first step, cold worker", _shown(first_steps)],
        ],
        "bounds": [
            {
                "what": "time of one worker / time of two, both branches",
                "value": speedup,
                "limit": f">= {MIN_SPEEDUP}",
                "ok": speedup >= MIN_SPEEDUP,
            },
            {
                "what": "first step of a cold worker, latest, s",
                "value": latest,
                "limit": f"<= {MAX_START_SECONDS:g}",
                "ok": latest <= MAX_START_SECONDS,
            },
        ],
        "notes": [
            f"{len(taken['one worker'].seconds)} interleaved rounds on warm workers; ratios are taken within a round.",
            "Wall time from handing in to the published artifacts. Cold: nothing is imported, both start at once.",
            "Together: one branch, its batches shared by a data-parallel group that Ray Train starts anew; no bound.",
        ],
    }


def _shown(seconds: Sequence[float]) -> str:
    timing = Timing(tuple(seconds))
    return f"{timing.median:.1f} ({min(seconds):.1f}..{max(seconds):.1f})"


def _run(
    cluster: Cluster,
    store: ArtifactStore,
    step: Step,
    resources: Resources = ONE,
    reporter: SilentReporter | None = None,
) -> Artifact:
    reporter = reporter or SilentReporter()
    return cluster.run(store, step, resources=resources, reporter=reporter, stopped=lambda: False)


def _at_once(
    cluster: Cluster, store: ArtifactStore, steps: Sequence[Step], reporters: Sequence[SilentReporter]
) -> list[Artifact]:
    with ThreadPoolExecutor(len(steps)) as pool:
        calls = [
            pool.submit(partial(_run, cluster, store, step, reporter=reporter))
            for step, reporter in zip(steps, reporters, strict=True)
        ]
        return [call.result() for call in calls]


def _inputs(folder: Path) -> dict[str, Artifact]:
    """A seed with random weights, and random tokens."""
    from moestro.data.tokenizer import train_bpe
    from moestro.models.checkpoint import save_model
    from moestro.seeding.pretrain import build_model

    train_bpe(["text"], MODEL.vocab_size).save_pretrained(folder / "tokenizer")
    save_model(build_model(MODEL, seed=0), folder / "seed", tokenizer_from=folder / "tokenizer")
    tokens = folder / "tokens"
    tokens.mkdir()
    ids = np.random.default_rng(0).integers(0, MODEL.vocab_size, TOKENS).astype(np.uint16)
    for split in ("train", "held_out"):
        np.save(tokens / f"{split}.npy", ids)
        np.save(tokens / f"{split}_documents.npy", np.zeros(1, dtype=np.int64))
    return {"seed": Artifact(folder / "seed", "seed", "5"), "tokens": Artifact(tokens, "tokens", "7")}
