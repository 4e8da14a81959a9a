"""The training loop: batches by step number, resumable at any point, the same bits however often it is interrupted.

Its state lies in `job.scratch`/training. The position in the data is the step alone, so nothing about data is kept.
"""

import copy
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel

from moestro.artifacts import Job
from moestro.config import TrainingConfig
from moestro.data.packed import Batch, Mixture, PackedTokens
from moestro.errors import ConfigError
from moestro.training import parallel
from moestro.training.attention import training_attention
from moestro.training.auxiliary import Auxiliary
from moestro.training.divergence import DivergenceGuard, check_finite
from moestro.training.frozen_experts import FrozenExperts
from moestro.training.held_out import HELD_OUT_LOSS, HeldOutText, Stopper
from moestro.training.history import History, TrainingResult
from moestro.training.learning_rates import ALIKE, RateFactors
from moestro.training.linear import training_linear
from moestro.training.objective import backward
from moestro.training.optimizer import build_optimizer, schedule_factor
from moestro.training.peak import matmul_peak
from moestro.training.plan import Plan, make_plan
from moestro.training.runtime import deterministic, keep_freed_memory
from moestro.training.state import load_state, save_state

STATE = "training"


def train(
    model: PreTrainedModel,
    mixture: Mixture,
    config: TrainingConfig,
    *,
    job: Job,
    trainable: Callable[[str], bool],
    auxiliary: Auxiliary | None = None,
    factors: RateFactors = ALIKE,
    frozen: FrozenExperts | None = None,
    held_out: Mapping[str, PackedTokens] | None = None,
) -> TrainingResult:
    """Train the parameters of `model` whose names `trainable` accepts, in place, and write `job.out`/history.json.

    `factors` multiply the learning rate by group of parameters; one whose factor is 0 does not train. `frozen` experts
    stay as they are. Where `config` stops early, the loss on `held_out` decides, and the weights are those of its
    lowest measurement.
    Resumes from `job.scratch`; with the same number of threads the result is bit for bit that of an undisturbed run.
    Raises `ConfigError` for what does not fit together and if nothing is left to train, `InputError` if the scratch is
    another run's, `TrainingError` naming step and domains if a loss or gradient is not finite, or if the loss diverges.
    """
    _check(model, config)
    _choose_what_trains(model, lambda name: trainable(name) and factors.factor(name) > 0)
    text = _held_out_text(config, held_out)
    torch.manual_seed(config.seed)
    dtype = getattr(torch, config.dtype)
    model.train()
    with ExitStack() as stack:
        stack.enter_context(deterministic())
        stack.enter_context(keep_freed_memory())
        stack.enter_context(training_attention(model, dtype=dtype, positions=config.sequence_length))
        stack.enter_context(training_linear(model, dtype=dtype))
        if auxiliary:
            stack.enter_context(auxiliary.attached())
        passes = _Passes(model, mixture, config, dtype, auxiliary)
        plan = make_plan(model, mixture, config, factors=factors, scratch=job.scratch, time_batch=passes.rehearse)
        optimizer, schedule = build_optimizer(model, config.optimizer, plan.steps, factors)
        result = _Run(passes, plan, job, optimizer, schedule, frozen, text).all_steps()
    parallel.only_the_first_goes_on()
    model.eval()
    return result


def _check(model: PreTrainedModel, config: TrainingConfig) -> None:
    parallel.check_share(config.batch_size, config.accumulation, parallel.num_workers())
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and config.sequence_length > longest:
        raise ConfigError(
            f"sequence_length: {config.sequence_length} is longer than the model's {longest} positions.",
            hint="Shorten sequence_length, or raise max_position_embeddings of the seed.",
        )


def _choose_what_trains(model: PreTrainedModel, trainable: Callable[[str], bool]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable(name))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            "No parameter is left to train.", hint="Choose another `trainable`, or raise a factor of `rates` above 0."
        )


def _held_out_text(config: TrainingConfig, domains: Mapping[str, PackedTokens] | None) -> HeldOutText | None:
    if config.early_stopping is None:
        return None
    if not domains:
        raise ConfigError("training.early_stopping: there is no held-out text to stop by.", hint="Leave it out.")
    return HeldOutText(domains, config, config.early_stopping.max_tokens)


@dataclass(frozen=True)
class _Passes:
    """Going through batches, forward and backward."""

    model: PreTrainedModel
    mixture: Mixture
    config: TrainingConfig
    dtype: torch.dtype
    auxiliary: Auxiliary | None

    def gradients(self, batch: Batch) -> float:
        """Add this worker's gradients of the mean loss to `.grad`; returns the mean loss over all workers."""
        config = self.config
        loss = backward(
            self.model,
            parallel.share(batch, config.accumulation),
            accumulation=config.accumulation,
            dtype=self.dtype,
            auxiliary=self.auxiliary,
            cross_document_attention=config.cross_document_attention,
        )
        return parallel.mean(loss)

    def rehearse(self, step: int) -> None:
        """Go through the batch of `step` and leave the auxiliary as it was; gradients stay."""
        auxiliary = self.auxiliary
        before = copy.deepcopy(auxiliary.state()) if auxiliary else {}
        if auxiliary:
            auxiliary.begin(step, step + 1)
        self.gradients(self.mixture.batch(step, self.config.batch_size))
        if auxiliary:
            auxiliary.restore(before)


@dataclass
class _Run:
    """One attempt at a training run."""

    passes: _Passes
    plan: Plan
    job: Job
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    frozen: FrozenExperts | None
    text: HeldOutText | None

    def __post_init__(self) -> None:
        self.model, self.mixture, self.config = self.passes.model, self.passes.mixture, self.passes.config
        self.auxiliary = self.passes.auxiliary
        self.parameters = [value for value in self.model.parameters() if value.requires_grad]
        self.stopper = Stopper(self.config.early_stopping) if self.config.early_stopping else None
        self.history = History()
        self.seconds = 0.0
        self.peak = matmul_peak(self.passes.dtype) * parallel.num_workers()

    def all_steps(self) -> TrainingResult:
        """Run the steps that are left, checkpointing as configured and at the end."""
        config, total = self.config, self.plan.steps
        done = logged = self._resume()
        self.guard = DivergenceGuard(self.model.config.vocab_size, self.history.losses)
        started = logged_at = time.monotonic()
        before = self.seconds
        while done < total and not self.stopped:
            figures = self._step(done)
            done += 1
            self.job.reporter.progress(done, total, f"loss {self.history.losses[-1]:.3f}")
            measured = self._measure(done)
            last = done == total or self.stopped
            if last or measured or done % config.log_every == 0:
                row = self.history.log(
                    done, figures | (parallel.means(self.auxiliary.metrics()) if self.auxiliary else {}) | measured
                )
                now = time.monotonic()
                self.job.reporter.metrics(row | self._speed(done - logged, now - logged_at), done)
                logged, logged_at = done, now
            if last or done % config.checkpoint_every == 0:
                self.seconds = before + time.monotonic() - started
                self._save(done)
        if self.stopper:
            self.stopper.load_best(self.model)
        if parallel.rank() == 0:
            self.history.write(self.job.out)
        return self._result(done)

    @property
    def stopped(self) -> bool:
        return self.stopper is not None and self.stopper.stopped

    def _speed(self, steps: int, seconds: float) -> dict[str, float]:
        tokens_per_second = steps * self.config.batch_size * self.config.sequence_length / seconds
        return {
            "tokens_per_second": tokens_per_second,
            "model_flops_utilization": tokens_per_second * self.plan.flops_per_token / self.peak,
        }

    def _measure(self, done: int) -> dict[str, float]:
        """The held-out losses where they are due after `done` steps."""
        if not (self.text and self.stopper) or (done % self.stopper.config.every and done < self.plan.steps):
            return {}
        losses = self.text.losses(self.model)
        self.stopper.measured(done, losses[HELD_OUT_LOSS], self.model)
        return losses

    def _step(self, step: int) -> dict[str, float]:
        """One optimiser step; returns its figures. Weights are left alone if anything is not finite."""
        config = self.config
        batch = self.mixture.batch(step, config.batch_size)
        if self.auxiliary:
            self.auxiliary.begin(step, self.plan.steps)
        loss = self.passes.gradients(batch)
        parallel.average_gradients(self.parameters)
        if self.frozen:
            self.frozen.empty_gradients()
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, config.optimizer.max_grad_norm))
        check_finite(step, loss, norm, batch, list(self.mixture.domains))
        self.guard.watch(loss)
        learning_rate = config.optimizer.learning_rate * schedule_factor(config.optimizer, step, self.plan.steps)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.auxiliary:
            self.auxiliary.end()
        if self.frozen:
            self.frozen.restore()
        self.history.losses.append(loss)
        return {"grad_norm": norm, "learning_rate": learning_rate}

    def _resume(self) -> int:
        extra: dict[str, Any] = {}
        with parallel.first_worker_first():
            done = load_state(
                self.job.scratch / STATE,
                model=self.model,
                optimizer=self.optimizer,
                schedule=self.schedule,
                owner=self.plan.owner,
                extra=extra,
            )
        if parallel.agreed(done, "The last checkpoint's step") is None or done is None:
            return 0
        self.history = History(**extra["history"])
        self.seconds = extra["seconds"]
        if self.auxiliary:
            self.auxiliary.restore(extra["auxiliary"])
        if self.stopper:
            self.stopper.restore(extra["stopper"])
        return done

    def _save(self, done: int) -> None:
        if parallel.rank() > 0:
            return
        save_state(
            self.job.scratch / STATE,
            done,
            model=self.model,
            optimizer=self.optimizer,
            schedule=self.schedule,
            owner=self.plan.owner,
            extra={
                "history": asdict(self.history),
                "seconds": self.seconds,
                "auxiliary": self.auxiliary.state() if self.auxiliary else {},
                "stopper": self.stopper.state() if self.stopper else {},
            },
        )

    def _result(self, done: int) -> TrainingResult:
        tokens = done * self.config.batch_size * self.config.sequence_length
        speed = self._speed(done, self.seconds)
        return TrainingResult(
            final_loss=self.history.rows[-1]["loss"],
            steps=done,
            tokens=tokens,
            tokens_per_second=speed["tokens_per_second"],
            seconds=self.seconds,
            loss_flatness=self.history.flatness(),
            flops=tokens * self.plan.flops_per_token,
            mfu=speed["model_flops_utilization"],
            epochs=self.mixture.epochs(done, self.config.batch_size),
            last=self.history.rows[-1],
            stopped_at=done if self.stopped else None,
            best_step=self.stopper.best_step if self.stopper else None,
            best_held_out_loss=self.stopper.best_loss if self.stopper else None,
        )
