"""`moestro bench r3-parity`: does the trainer use the very experts that the engine used, and what does it change?

vLLM and the trainer compute the same rollouts, both in bfloat16, and as a control in float32: with the trainer's own
routing, with the engine's replayed, and with the engine's one row off. On the quickstart's model, going on with text
of all its domains and with its task, and on one whose routing rounding often changes, with three random seeds each (of
sampling; of the fragile model's weights too).
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from moestro.config import RlConfig, TaskConfig
from moestro.errors import TrainingError
from moestro.models.checkpoint import load_model
from moestro.rl.divergence import extreme_fraction, k3_divergence
from moestro.rl.policy import Inspection, inspect, received_ids
from moestro.rl.preflight import preflight, require_alignment, shift
from moestro.rl.rollouts import Rollouts
from moestro.rl.update import Learner, accumulate, prepare
from moestro.training.optimizer import build_optimizer
from moestro_services.replay.batches import HELD_OUT_PROMPTS, PROMPTS, held_out_prompts, sample, task_prompts
from moestro_services.replay.models import quickstart, write_fragile

SEEDS = (0, 1, 2)
Dtype = Literal["float32", "bfloat16"]
QUICKSTART, TASK, FRAGILE = "quickstart", "quickstart, its task", "fragile"
MODELS = (QUICKSTART, TASK, FRAGILE)
MIN_GAIN = {QUICKSTART: 1.5, FRAGILE: 8.0}
"""By model, how many times as far apart engine and trainer are without replay, at least."""
MAX_FLOAT32_K3 = 1e-8
MIN_SHIFT_FACTOR = 100.0
GENTLE = 1.1
"""A ratio of probabilities; of these small models few tokens exceed 2."""


@dataclass(frozen=True)
class Row:
    """One way of routing on one batch."""

    mode: str
    k3: float
    f_tau2: float
    f_gentle: float
    router_mismatch: float


@dataclass(frozen=True)
class Measured:
    """One model, type and random seed."""

    model: str
    dtype: Dtype
    off: Row
    replayed: Row
    shifted: Row
    recompute_mismatch: float
    """Share of (token, layer) pairs whose experts were not the engine's, where log-probabilities are recomputed."""
    update_mismatch: float
    """The same in the update's forward pass."""
    complete: float
    refused: bool
    """Whether the batch with routing one row off is refused before the first update."""


def bench(seeds: Sequence[int] = SEEDS) -> dict[str, Any]:
    """A few minutes, and as many more where the quickstart's model is not in the home yet."""
    lifecycle, tuned, tokens = quickstart()
    assert isinstance(lifecycle.rl, RlConfig)
    prompts = task_prompts(tuned.path, lifecycle.rl.task, PROMPTS), held_out_prompts(tokens, HELD_OUT_PROMPTS)
    with tempfile.TemporaryDirectory() as name:
        return report(list(_all(tuned.path, *prompts, seeds, Path(name))))


def _all(
    tuned: Path, task: list[list[int]], text: list[list[int]], seeds: Sequence[int], folder: Path
) -> Iterator[Measured]:
    for seed in seeds:
        fragile = folder / f"fragile-{seed}"
        write_fragile(fragile, tuned, seed=seed)
        for dtype in ("bfloat16", "float32"):
            yield measure(QUICKSTART, tuned, text, dtype, seed)
            yield measure(TASK, tuned, task, dtype, seed)
            yield measure(FRAGILE, fragile, task, dtype, seed)


def measure(name: str, folder: Path, prompts: list[list[int]], dtype: Dtype, seed: int) -> Measured:
    """Sample with vLLM, and compare with the trainer."""
    sampled = sample(folder, prompts, dtype=dtype, seed=seed)
    model, batch = load_model(folder, dtype=getattr(torch, dtype)).eval(), sampled.batch
    off, _ = _row("off", model, batch, replay=False)
    replayed, recompute = _row("R3", model, batch, replay=True)
    shifted = min((_row("R3, a row off", model, shift(batch, rows), replay=True)[0] for rows in (1, -1)), key=_k3)
    return Measured(
        name,
        dtype,
        off,
        replayed,
        shifted,
        recompute,
        _update_mismatch(model, batch),
        sampled.complete,
        _refused(model, batch, dtype),
    )


def _k3(row: Row) -> float:
    return row.k3


def _row(mode: str, model: PreTrainedModel, batch: Rollouts, *, replay: bool) -> tuple[Row, float]:
    """The figures, and the share of pairs whose used experts are not those of the batch's routes."""
    inspection = Inspection()
    train_BS, _ = inspect(model, batch, inspection, temperature=1.0, replay=replay)
    train, engine = train_BS[batch.mask_BS], batch.engine_logprobs_BS[batch.mask_BS]
    row = Row(
        mode,
        k3_divergence(train, engine),
        extreme_fraction(train, engine),
        extreme_fraction(train, engine, GENTLE),
        inspection.router_mismatch,
    )
    return row, inspection.used_mismatch


def _update_mismatch(model: PreTrainedModel, batch: Rollouts) -> float:
    """Share of (token, layer) pairs for which the experts got others than the engine's in an update."""
    config = RlConfig(task=TaskConfig(name="chain_sum"), micro_batch_size=len(batch), routing="r3")
    optimizer, schedule = build_optimizer(model, config.optimizer, 1)
    learner = Learner(model, optimizer, schedule, config, "r3")
    prepared, _ = prepare(learner, batch)
    with received_ids(model) as received:
        accumulate(learner, prepared)
    model.zero_grad(set_to_none=True)
    assert batch.routes_BSLK is not None
    real_T = batch.real_BS.flatten()
    wanted_TLK = batch.routes_BSLK.flatten(0, 1)[real_T].sort(dim=-1).values
    used_TLK = torch.stack(received, dim=1)[real_T].sort(dim=-1).values
    return float((wanted_TLK != used_TLK).any(dim=-1).double().mean())


def _refused(model: PreTrainedModel, batch: Rollouts, dtype: Dtype) -> bool:
    try:
        found = preflight(model, shift(batch, 1), temperature=1.0, micro_batch_size=len(batch))
        require_alignment(found, rollout_dtype=dtype)
    except TrainingError:
        return True
    return False


def report(found: Sequence[Measured]) -> dict[str, Any]:
    """The table, its bounds and notes."""
    return {
        "title": "Engine against trainer, with and without routing replay",
        "columns": [
            "model",
            "type",
            "routing",
            "k3, nats (worst seed)",
            "F(2)",
            f"F({GENTLE})",
            "own router differs",
        ],
        "rows": [
            row
            for model in MODELS
            for dtype in ("bfloat16", "float32")
            for row in _rows(model, dtype, [one for one in found if (one.model, one.dtype) == (model, dtype)])
        ],
        "bounds": list(_bounds(found)),
        "notes": [
            f"4 completions of 48 tokens each; both sides in one type. Prompts: {HELD_OUT_PROMPTS} stretches of "
            f"held-out text of all the quickstart's domains; else {PROMPTS} problems of its task.",
            "k3 estimates KL(engine || trainer) per token; F(t): share of tokens whose probabilities differ by more "
            "than a factor of t.",
            "Own router differs: share of (token, layer) pairs in which the trainer alone would choose other experts.",
        ],
    }


def _rows(model: str, dtype: str, some: Sequence[Measured]) -> Iterator[list[str]]:
    for rows in ([one.off for one in some], [one.replayed for one in some], [one.shifted for one in some]):
        worst = max(rows, key=_k3)
        yield [
            model,
            dtype,
            worst.mode,
            f"{worst.k3:.2e}",
            f"{max(row.f_tau2 for row in rows):.2e}",
            f"{max(row.f_gentle for row in rows):.2e}",
            f"{max(row.router_mismatch for row in rows):.2%}",
        ]


def _bounds(found: Sequence[Measured]) -> Iterator[dict[str, Any]]:
    rough = [one for one in found if one.dtype == "bfloat16"]
    exact = [one for one in found if one.dtype == "float32"]
    yield _most("used experts that are not the engine's, recompute", [one.recompute_mismatch for one in found], 0.0)
    yield _most("used experts that are not the engine's, update", [one.update_mismatch for one in found], 0.0)
    yield _least("samples whose rows are complete", [one.complete for one in found], 1.0)
    for model, limit in MIN_GAIN.items():
        some = [one for one in rough if one.model == model]
        gains = [one.off.k3 / one.replayed.k3 for one in some]
        yield _least(f"{model}, bfloat16: k3 without replay by k3 with it, worst seed", gains, limit)
        yield _most(
            f"{model}, bfloat16: F({GENTLE}) with replay by F({GENTLE}) without it, worst seed",
            [one.replayed.f_gentle / max(one.off.f_gentle, 1e-12) for one in some],
            1 / limit,
        )
    yield _most(
        "float32: k3 with or without replay", [max(one.off.k3, one.replayed.k3) for one in exact], MAX_FLOAT32_K3
    )
    yield _least(
        "float32: k3 one row off by k3 as it is",
        [one.shifted.k3 / max(one.replayed.k3, 1e-12) for one in exact],
        MIN_SHIFT_FACTOR,
    )
    yield _least("batches one row off that are refused", [float(one.refused) for one in found], 1.0)


def _most(what: str, values: Sequence[float], limit: float) -> dict[str, Any]:
    return {"what": what, "value": max(values), "limit": f"<= {limit:.3g}", "ok": max(values) <= limit}


def _least(what: str, values: Sequence[float], limit: float) -> dict[str, Any]:
    return {"what": what, "value": min(values), "limit": f">= {limit:.3g}", "ok": min(values) >= limit}
