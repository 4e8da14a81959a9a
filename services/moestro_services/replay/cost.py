"""`moestro bench r3-cost`: what replay, capture, Moestro's way to the engine and the weight refresh cost.

Everything is compared with its rival in this process, in turn, on the quickstart's model: updates with and without
replay on one batch; engines with and without capture on the same prompts; rollouts through Moestro, judged and
recorded, against a bare loop over vLLM's `generate`, with capture and without; a refresh against the whole step that it
is part of. The engine is in this process, as it is in `moestro stage`; a lifecycle hosts it in a Ray actor.
"""

import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moestro.config import RlConfig
from moestro.data.tasks import Task
from moestro.data.tokenizer import load_tokenizer
from moestro.inference.engine import EngineConfig, Sampling, VllmEngine
from moestro.inference.routes import require_routing
from moestro.models.checkpoint import load_model, save_model
from moestro.rl.curriculum import build_curriculum, derived_seed
from moestro.rl.probe import agreement, pick
from moestro.rl.records import Writer
from moestro.rl.rewards import Judge
from moestro.rl.rollouts import Rollouts
from moestro.rl.sampling import Sampler, as_batch
from moestro.rl.update import Learner, prepare, update
from moestro.training.optimizer import build_optimizer
from moestro.training.runtime import deterministic
from moestro_kernels.timing import Ratio, Timing, interleaved, ratio
from moestro_services.replay.models import quickstart

ROUNDS = 11
BATCHES = 4
MAX_UPDATE = 1.05
MIN_CAPTURE = 0.95
MIN_THROUGHPUT = 0.95
MAX_REFRESH_SHARE = 0.03
MAX_DIFFERENCE = 1e-4


@dataclass(frozen=True)
class Costs:
    """What was measured."""

    update: dict[str, Timing]
    rollout: dict[str, Timing]
    refresh: Timing
    verify: Timing
    tokens: int
    """Completion tokens of all batches of rollouts."""
    bytes_per_token: float
    expected_bytes: int
    difference: float
    """Largest difference of log-probabilities after a refresh, nats."""
    control: float
    """The same after vLLM's own reload."""


def bench(rounds: int = ROUNDS) -> dict[str, Any]:
    """Some minutes, on two cores that should be idle."""
    lifecycle, tuned, _ = quickstart()
    assert isinstance(lifecycle.rl, RlConfig)
    with tempfile.TemporaryDirectory() as name:
        return report(measure(lifecycle.rl, tuned.path, Path(name), rounds))


def measure(config: RlConfig, source: Path, folder: Path, rounds: int) -> Costs:
    """All of it, in one process."""
    model = load_model(source, dtype=torch.float32)
    tokenizer, task = load_tokenizer(source), Task.open(config.task)
    curriculum = build_curriculum(
        config,
        task,
        tokenizer,
        max_positions=int(model.config.max_position_embeddings),
        vocab_size=int(model.config.vocab_size),
    )
    sampler = Sampler(config, curriculum, Judge(config.rewards, task), tokenizer, Writer(folder / "records"), "bench")
    length = curriculum.longest_prompt + config.max_tokens + 1
    with (
        closing(_engine(source, length, routes=True)) as capturing,
        closing(_engine(source, length, routes=False)) as plain,
    ):
        sampled = [sampler.obtain(capturing, step, version=step) for step in range(BATCHES)]
        sampler.records.settle()
        batch = as_batch(config, sampled[0].record)
        rollout = interleaved(_rollouts(sampler, capturing, plain), seconds=0.0, min_rounds=rounds)
        sequences = _sequences(batch, length - 1)
        refresh, verify, difference = _refresh(capturing, model, source, folder, sequences, rounds)
        control = _stock_reload(plain, model, folder, sequences)
    shape = require_routing(source, length, hint="")
    assert batch.routes_BSLK is not None
    return Costs(
        update=interleaved(_updates(config, source, batch), seconds=0.0, min_rounds=rounds),
        rollout=rollout,
        refresh=refresh,
        verify=verify,
        tokens=sum(batch.tokens for batch in sampled),
        bytes_per_token=_captured_bytes(sampled[0].record.groups),
        expected_bytes=(shape.num_layers - len(shape.dense_layers)) * shape.num_experts_per_tok,
        difference=difference,
        control=control,
    )


class BareEngine(VllmEngine):
    """An engine that can also be used as one would use vLLM alone."""

    def bare(self, prompts: list[list[int]], sampling: Sampling) -> object:
        """vLLM's `generate` from the same random seed, so that as many tokens come out; none of them is looked at."""
        from vllm import SamplingParams

        params = SamplingParams(
            n=sampling.n,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            stop_token_ids=sampling.stop_token_ids,
            ignore_eos=True,
            logprobs=0,
            detokenize=False,
        )
        self._llm.reset_prefix_cache()
        self._llm.collective_rpc("seed_sampling", args=(sampling.seed,))
        return self._llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)

    def stock_reload(self, folder: Path) -> None:
        """vLLM's own reload of weights."""
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        self._llm.reset_prefix_cache()


def _engine(source: Path, length: int, *, routes: bool) -> BareEngine:
    return BareEngine(source, EngineConfig(max_model_len=length, routes=routes))


def _rollouts(sampler: Sampler, capturing: BareEngine, plain: BareEngine) -> dict[str, Callable[[], object]]:
    """`BATCHES` batches in a loop, the same in each way; the last record is on disk before the clock stops."""
    config, steps = sampler.config, range(BATCHES)
    samplings = [
        Sampling(
            n=config.num_generations,
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            seed=derived_seed(config.seed, step, "sampling"),
            stop_token_ids=sampler.curriculum.stop_token_ids,
        )
        for step in steps
    ]

    def through_moestro() -> None:
        for record in sampler.records.folder.glob("*.npz"):
            record.unlink()
        for step in steps:
            sampler.obtain(capturing, step, version=step)
        sampler.records.settle()

    def bare(engine: BareEngine) -> Callable[[], None]:
        def loop() -> None:
            for step in steps:
                engine.bare(sampler.curriculum.prompts[step], samplings[step])

        return loop

    return {"through Moestro": through_moestro, "bare vLLM, capturing": bare(capturing), "bare vLLM": bare(plain)}


def _updates(config: RlConfig, source: Path, batch: Rollouts) -> dict[str, Callable[[], object]]:
    """Whole updates, each on a model of its own; what they learn is thrown away, so that routing stays as it was."""

    def make(mode: Any) -> Callable[[], object]:
        model = load_model(source, dtype=torch.float32)
        still = config.optimizer.model_copy(update={"learning_rate": 1e-12})
        optimizer, schedule = build_optimizer(model, still, 1000)
        learner = Learner(model, optimizer, schedule, config, mode)

        def run() -> object:
            with deterministic():
                prepared, _ = prepare(learner, batch)
                return update(learner, prepared, step=1)

        return run

    return {"off": make("off"), "r3": make("r3")}


def _sequences(batch: Rollouts, length: int) -> list[list[int]]:
    rows = zip(batch.inputs_BS, batch.real_BS.sum(dim=1).tolist(), strict=True)
    return pick([inputs_S[:count].tolist() for inputs_S, count in rows], max_length=length)


def _refresh(
    running: BareEngine, model: Any, source: Path, folder: Path, sequences: list[list[int]], rounds: int
) -> tuple[Timing, Timing, float]:
    """Seconds of writing the weights and taking them up, and of checking them; the largest difference seen."""
    taken, checked, differences = [], [], []
    for number in range(rounds):
        with torch.no_grad():  # as an update would
            for parameter in model.parameters():
                parameter.mul_(1.0 + 1e-3 * (-1) ** number)
        target = folder / f"policy-{number}"
        started = time.perf_counter()
        save_model(model, target, tokenizer_from=source)
        running.refresh(target)
        taken.append(time.perf_counter() - started)
        started = time.perf_counter()
        differences.append(agreement(model, sequences, running.score(sequences)).largest_difference)
        checked.append(time.perf_counter() - started)
    return Timing(tuple(taken)), Timing(tuple(checked)), max(differences)


def _stock_reload(running: BareEngine, model: Any, folder: Path, sequences: list[list[int]]) -> float:
    """What vLLM's own `reload_weights` leaves: the control that the check has to fail."""
    running.stock_reload(sorted(folder.glob("policy-*"))[-1])
    return agreement(model, sequences, running.score(sequences)).largest_difference


def _captured_bytes(groups: Any) -> float:
    routes = [answer.routes for group in groups for answer in group]
    return float(np.mean([rows.nbytes / len(rows) for rows in routes]))


def report(costs: Costs) -> dict[str, Any]:
    """The table, its bounds and notes."""
    replay = ratio(costs.update["r3"], costs.update["off"])
    capture = ratio(costs.rollout["bare vLLM"], costs.rollout["bare vLLM, capturing"])
    through = ratio(costs.rollout["bare vLLM, capturing"], costs.rollout["through Moestro"])
    whole = ratio(costs.rollout["bare vLLM"], costs.rollout["through Moestro"])
    step = costs.rollout["through Moestro"].median / BATCHES + costs.update["r3"].median
    share = costs.refresh.median / (step + costs.refresh.median + costs.verify.median)
    speeds = {name: costs.tokens / timing.median for name, timing in costs.rollout.items()}
    return {
        "title": "What routing replay costs, on the quickstart's model",
        "columns": ["what", "median, s", "tokens/s", "compared"],
        "rows": [
            ["update, no replay", f"{costs.update['off'].median:.3f}", "", ""],
            ["update, R3", f"{costs.update['r3'].median:.3f}", "", f"{_quartiles(replay)} of its time without"],
            ["rollouts, bare vLLM", *_speed(costs, speeds, "bare vLLM"), ""],
            [
                "rollouts, bare vLLM, capturing",
                *_speed(costs, speeds, "bare vLLM, capturing"),
                f"{_quartiles(capture)} as fast",
            ],
            [
                "rollouts through Moestro",
                *_speed(costs, speeds, "through Moestro"),
                f"{_quartiles(through)} of capturing's speed, {_quartiles(whole)} of plain vLLM's",
            ],
            ["weight refresh", f"{costs.refresh.median:.3f}", "", f"{share:.2%} of a step"],
            ["its check", f"{costs.verify.median:.3f}", "", ""],
        ],
        "bounds": _bounds(costs, replay, capture, through, whole, share),
        "notes": [
            f"{costs.tokens} completion tokens in a loop of {BATCHES} batches; medians of rounds in turn, quartiles in "
            "brackets; float32. Through Moestro: sampled with capture, decoded, judged and recorded on disk.",
            "The engine is in this process, as in `moestro stage rl`. In a lifecycle it is in a Ray actor, with one "
            "node too: what crossing over to it costs is not in these figures.",
        ],
    }


def _bounds(
    costs: Costs, replay: Ratio, capture: Ratio, through: Ratio, whole: Ratio, share: float
) -> list[dict[str, Any]]:
    return [
        _bound("update with R3 by update without", replay.median, MAX_UPDATE, most=True),
        _bound("rollout tokens/s with capture by without", capture.median, MIN_CAPTURE, most=False),
        _bound("rollout tokens/s through Moestro by capturing vLLM's", through.median, MIN_THROUGHPUT, most=False),
        _bound("rollout tokens/s through Moestro by plain vLLM's", whole.median, MIN_THROUGHPUT, most=False),
        _bound("weight refresh, share of a step", share, MAX_REFRESH_SHARE, most=True),
        _bound("log-probabilities after a refresh, largest difference", costs.difference, MAX_DIFFERENCE, most=True),
        _bound("the same after vLLM's own reload (has to fail)", costs.control, MAX_DIFFERENCE, most=False),
        {
            "what": "routing bytes per token",
            "value": costs.bytes_per_token,
            "limit": f"= layers x k = {costs.expected_bytes}",
            "ok": costs.bytes_per_token == costs.expected_bytes,
        },
    ]


def _speed(costs: Costs, speeds: dict[str, float], name: str) -> tuple[str, str]:
    return f"{costs.rollout[name].median:.3f}", f"{speeds[name]:.0f}"


def _quartiles(found: Ratio) -> str:
    return f"{found.median:.3f} [{found.low:.3f}, {found.high:.3f}]"


def _bound(what: str, value: float, limit: float, *, most: bool) -> dict[str, Any]:
    ok = value <= limit if most else value >= limit
    return {"what": what, "value": value, "limit": f"{'<=' if most else '>='} {limit:.3g}", "ok": ok}
