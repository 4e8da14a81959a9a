"""The training loop: batches by step number, resumable at any point, the same bits however often it is interrupted.

Its state lies in `job.scratch`/training. The position in the data is the step alone, so nothing about data is kept.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel

from moestro.artifacts import Job
from moestro.config import TrainingConfig
from moestro.data.packed import Mixture, PackedTokens
from moestro.errors import ConfigError
from moestro.training import parallel
from moestro.training.attention import training_attention
from moestro.training.auxiliary import Auxiliary
from moestro.training.checkpoints import Checkpoints, Progress
from moestro.training.divergence import DivergenceGuard, check_finite
from moestro.training.frozen_experts import FrozenExperts
from moestro.training.held_out import HELD_OUT_LOSS, HeldOutText, Stopper
from moestro.training.history import TrainingResult
from moestro.training.learning_rates import ALIKE, RateFactors
from moestro.training.linear import training_linear
from moestro.training.meter import Meter
from moestro.training.optimizer import build_optimizer, schedule_factor
from moestro.training.passes import Passes
from moestro.training.peak import matmul_peak
from moestro.training.plan import Plan, make_plan
from moestro.training.runtime import deterministic, keep_freed_memory
from moestro.training.state import nothing_trained

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
    Raises `ConfigError` for what does not fit together, `InputError` for another run's scratch or a batch that predicts
    nothing, `TrainingError` naming the last good checkpoint for what is not finite or diverges, or a broken end.
    """
    _check(model, config)
    _choose_what_trains(model, lambda name: trainable(name) and factors.factor(name) > 0)
    text = _held_out_text(config, held_out)
    torch.manual_seed(config.seed)
    model.train()
    passes = Passes(model, mixture, config, auxiliary)
    with ExitStack() as stack:
        stack.enter_context(deterministic())
        stack.enter_context(keep_freed_memory())
        stack.enter_context(training_attention(model, dtype=passes.dtype, positions=config.sequence_length))
        stack.enter_context(training_linear(model, dtype=passes.dtype))
        if auxiliary:
            stack.enter_context(auxiliary.attached())
        plan = make_plan(
            model,
            mixture,
            config,
            factors=factors,
            auxiliary=auxiliary,
            frozen=frozen,
            scratch=job.scratch,
            time_batch=lambda step: passes.rehearse(step, step + 1),
        )
        result = _Run.resumed(passes, plan, job, factors, frozen, text).all_steps()
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


@dataclass
class _Run:
    """One attempt at a training run."""

    passes: Passes
    plan: Plan
    job: Job
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    frozen: FrozenExperts | None
    text: HeldOutText | None
    stopper: Stopper | None
    checkpoints: Checkpoints
    progress: Progress
    guard: DivergenceGuard
    meter: Meter

    @classmethod
    def resumed(
        cls,
        passes: Passes,
        plan: Plan,
        job: Job,
        factors: RateFactors,
        frozen: FrozenExperts | None,
        text: HeldOutText | None,
    ) -> "_Run":
        """The run where its newest checkpoint has it, or at its beginning."""
        model, config = passes.model, passes.config
        optimizer, schedule = build_optimizer(model, config.optimizer, plan.steps, factors)
        stopper = Stopper(config.early_stopping) if config.early_stopping else None
        checkpoints = Checkpoints(
            job.scratch / STATE, plan.owner, model, optimizer, schedule, passes.auxiliary, stopper
        )
        progress = checkpoints.resume()
        guard = DivergenceGuard(model.config.vocab_size, progress.history.losses)
        meter = Meter(config, plan.flops_per_token, matmul_peak(passes.dtype) * parallel.num_workers())
        return cls(passes, plan, job, optimizer, schedule, frozen, text, stopper, checkpoints, progress, guard, meter)

    def all_steps(self) -> TrainingResult:
        """Run the steps that are left, and see to it that what they end with is worth keeping."""
        with self.checkpoints.named(self.guard):
            self._train()
            self._judge()
        if parallel.rank() == 0:
            self.progress.history.write(self.job.out)
        return self.meter.result(self.progress, self.passes.mixture, self.stopper)

    def _train(self) -> None:
        """Steps until the end, checkpointing as configured and there."""
        config, progress, auxiliary = self.passes.config, self.progress, self.passes.auxiliary
        logged, before = progress.done, progress.seconds
        started = logged_at = time.monotonic()
        while progress.done < self.plan.steps and not self.stopped:
            figures = self._step(progress.done)
            progress.done += 1
            done = progress.done
            self.job.reporter.progress(done, self.plan.steps, f"loss {progress.history.losses[-1]:.3f}")
            measured = self._measure(done)
            last = done == self.plan.steps or self.stopped
            if last or measured or done % config.log_every == 0:
                row = progress.history.log(
                    done, figures | (parallel.means(auxiliary.metrics()) if auxiliary else {}) | measured
                )
                now = time.monotonic()
                self.job.reporter.metrics(row | self.meter.speed(done - logged, now - logged_at), done)
                logged, logged_at = done, now
            if last or done % config.checkpoint_every == 0:
                progress.seconds = before + time.monotonic() - started
                self.checkpoints.save(progress, self.guard)

    def _judge(self) -> None:
        """Raise `TrainingError` if the run has diverged at its end or its last step broke the weights.

        No step's loss is of the weights that the last one left, so batches are gone through once more. Where the best
        weights are kept, it does not matter how the run ended.
        """
        steps = [0]
        if self.stopper:
            self.stopper.load_best(self.passes.model)
        else:
            self.guard.finish()
            steps.append(self.progress.done - 1)
        for step in sorted(set(steps)):
            self.guard.check_outcome(step, *self._rehearsed(step))

    def _rehearsed(self, step: int) -> tuple[float, float]:
        """The loss of the batch of `step` with the present weights, and its gradient's norm (of several workers, the
        mean of theirs)."""
        with nothing_trained(self.passes.model):
            loss = self.passes.rehearse(step, self.plan.steps)
            if self.frozen:
                self.frozen.empty_gradients()
            norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        return loss, parallel.mean(float(norm))

    def _terms_at_fault(self, step: int) -> Sequence[str]:
        """The auxiliary's losses that make the gradient of the batch of `step` one that is not finite; none where it is
        so without them."""
        auxiliary = self.passes.auxiliary
        if auxiliary is None or not self._finite_with(auxiliary, (), step):
            return ()
        terms = auxiliary.terms()
        return [term for term in terms if not self._finite_with(auxiliary, (term,), step)] or terms

    def _finite_with(self, auxiliary: Auxiliary, terms: tuple[str, ...], step: int) -> bool:
        self.passes.model.zero_grad(set_to_none=True)
        with auxiliary.only(terms):
            return math.isfinite(self._rehearsed(step)[1])

    @property
    def stopped(self) -> bool:
        return self.stopper is not None and self.stopper.stopped

    @property
    def _parameters(self) -> list[nn.Parameter]:
        return [value for value in self.passes.model.parameters() if value.requires_grad]

    def _measure(self, done: int) -> dict[str, float]:
        """The held-out losses where they are due after `done` steps."""
        if not (self.text and self.stopper) or (done % self.stopper.config.every and done < self.plan.steps):
            return {}
        losses = self.text.losses(self.passes.model, done)
        self.stopper.measured(done, losses[HELD_OUT_LOSS], self.passes.model)
        return losses

    def _step(self, step: int) -> dict[str, float]:
        """One optimiser step; returns its figures. Weights are left alone if anything is not finite."""
        config, auxiliary = self.passes.config.optimizer, self.passes.auxiliary
        batch = self.passes.batch(step)
        if auxiliary:
            auxiliary.begin(step, self.plan.steps)
        loss = self.passes.gradients(batch)
        parallel.average_gradients(self._parameters)
        if self.frozen:
            self.frozen.empty_gradients()
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, config.max_grad_norm))
        check_finite(step, loss, norm, self.passes.sources(step), lambda: self._terms_at_fault(step))
        self.guard.watch(loss)
        learning_rate = config.learning_rate * schedule_factor(config, step, self.plan.steps)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        if auxiliary:
            auxiliary.end()
        if self.frozen:
            self.frozen.restore()
        self.progress.history.losses.append(loss)
        return {"grad_norm": norm, "learning_rate": learning_rate}
