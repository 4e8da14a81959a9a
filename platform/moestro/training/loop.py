"""The training loop: batches by step number, resumable at any point, the same bits however often it is interrupted.

Its state lies in `job.scratch`/training. The position in the data is the step alone, so nothing about data is kept.
"""

import math
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel

from moestro.artifacts import Job
from moestro.config import TrainingConfig
from moestro.data.packed import Mixture
from moestro.errors import ConfigError, TrainingError
from moestro.training.attention import training_attention
from moestro.training.auxiliary import Auxiliary
from moestro.training.history import History, TrainingResult
from moestro.training.objective import backward
from moestro.training.optimizer import build_optimizer
from moestro.training.runtime import deterministic, keep_freed_memory
from moestro.training.state import load_state, save_state

STATE = "training"
HINT = "Lower `learning_rate` or raise `warmup_steps`; the last checkpoint before it is kept."


def train(
    model: PreTrainedModel,
    mixture: Mixture,
    config: TrainingConfig,
    *,
    job: Job,
    trainable: Callable[[str], bool],
    auxiliary: Auxiliary | None = None,
) -> TrainingResult:
    """Train the parameters of `model` whose names `trainable` accepts, in place, and write `job.out`/history.json.

    Resumes from `job.scratch`; with the same number of threads the result is bit for bit that of an undisturbed run.
    Raises `ConfigError` for a sequence that does not fit, `TrainingError` naming step and domains if a loss
    or gradient is not finite.
    """
    _check(model, config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable(name))
    torch.manual_seed(config.seed)
    optimizer, schedule = build_optimizer(model, config.optimizer, config.steps)
    run = _Run(model, mixture, config, job, optimizer, schedule, auxiliary)
    model.train()
    with ExitStack() as stack:
        stack.enter_context(deterministic())
        stack.enter_context(keep_freed_memory())
        stack.enter_context(training_attention(model, dtype=run.dtype, positions=config.sequence_length))
        if auxiliary:
            stack.enter_context(auxiliary.attached())
        result = run.all_steps()
    model.eval()
    return result


def _check(model: PreTrainedModel, config: TrainingConfig) -> None:
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and config.sequence_length > longest:
        raise ConfigError(
            f"sequence_length: {config.sequence_length} is longer than the model's {longest} positions.",
            hint="Shorten sequence_length, or raise max_position_embeddings of the seed.",
        )


@dataclass
class _Run:
    """One attempt at a training run."""

    model: PreTrainedModel
    mixture: Mixture
    config: TrainingConfig
    job: Job
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    auxiliary: Auxiliary | None

    def __post_init__(self) -> None:
        self.dtype: torch.dtype = getattr(torch, self.config.dtype)
        self.parameters = [value for value in self.model.parameters() if value.requires_grad]
        self.history = History()
        self.seconds = 0.0

    def all_steps(self) -> TrainingResult:
        """Run the steps that are left, checkpointing as configured and at the end."""
        config = self.config
        done = logged = self._resume()
        started = logged_at = time.monotonic()
        before = self.seconds
        while done < config.steps:
            figures = self._step(done)
            done += 1
            self.job.reporter.progress(done, config.steps, f"loss {self.history.losses[-1]:.3f}")
            if done % config.log_every == 0 or done == config.steps:
                row = self.history.log(done, figures | (self.auxiliary.metrics() if self.auxiliary else {}))
                now = time.monotonic()
                speed = (done - logged) * self.tokens_per_step / (now - logged_at)
                self.job.reporter.metrics(row | {"tokens_per_second": speed}, done)
                logged, logged_at = done, now
            if done % config.checkpoint_every == 0 or done == config.steps:
                self.seconds = before + time.monotonic() - started
                self._save(done)
        self.history.write(self.job.out)
        return self._result()

    @property
    def tokens_per_step(self) -> int:
        return self.config.batch_size * self.config.sequence_length

    def _step(self, step: int) -> dict[str, float]:
        """One optimiser step; returns its figures. Weights are left alone if anything is not finite."""
        config = self.config
        batch = self.mixture.batch(step, config.batch_size)
        if self.auxiliary:
            self.auxiliary.begin(step, config.steps)
        loss = backward(self.model, batch, accumulation=config.accumulation, dtype=self.dtype, auxiliary=self.auxiliary)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, config.optimizer.max_grad_norm))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self._not_finite(step, loss, norm, batch.domains_B)
        learning_rate = float(self.schedule.get_last_lr()[0])
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.auxiliary:
            self.auxiliary.end()
        self.history.losses.append(loss)
        return {"grad_norm": norm, "learning_rate": learning_rate}

    def _not_finite(self, step: int, loss: float, norm: float, domains_B: Tensor) -> TrainingError:
        names = list(self.mixture.domains)
        counts = Counter(names[domain] for domain in domains_B.tolist())
        sequences = ", ".join(f"{name} ({count} sequences)" for name, count in sorted(counts.items()))
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
        return TrainingError(f"Training stopped at step {step + 1}: {what}. Its batch: {sequences}.", hint=HINT)

    def _resume(self) -> int:
        extra: dict[str, Any] = {}
        done = load_state(
            self.job.scratch / STATE,
            model=self.model,
            optimizer=self.optimizer,
            schedule=self.schedule,
            extra=extra,
        )
        if done is None:
            return 0
        self.history = History(**extra["history"])
        self.seconds = extra["seconds"]
        if self.auxiliary:
            self.auxiliary.restore(extra["auxiliary"])
        return done

    def _save(self, done: int) -> None:
        save_state(
            self.job.scratch / STATE,
            done,
            model=self.model,
            optimizer=self.optimizer,
            schedule=self.schedule,
            extra={
                "history": asdict(self.history),
                "seconds": self.seconds,
                "auxiliary": self.auxiliary.state() if self.auxiliary else {},
            },
        )

    def _result(self) -> TrainingResult:
        tokens = self.config.steps * self.tokens_per_step
        return TrainingResult(
            final_loss=self.history.rows[-1]["loss"],
            steps=self.config.steps,
            tokens=tokens,
            tokens_per_second=tokens / self.seconds,
            seconds=self.seconds,
            loss_flatness=self.history.flatness(),
            last=self.history.rows[-1],
        )
