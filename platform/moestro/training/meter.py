"""A run's speed, and its key figures at the end."""

from dataclasses import dataclass

from moestro.config import TrainingConfig
from moestro.data.packed import Mixture
from moestro.training.checkpoints import Progress
from moestro.training.held_out import Stopper
from moestro.training.history import TrainingResult


@dataclass(frozen=True)
class Meter:
    """What turns steps and seconds of a run into figures."""

    config: TrainingConfig
    flops_per_token: float
    """Model FLOPs, forward and backward."""
    peak: float
    """FLOPs per second that the matrix products of all workers reach."""

    def tokens(self, steps: int) -> int:
        """Tokens that `steps` steps train on."""
        return steps * self.config.batch_size * self.config.sequence_length

    def speed(self, steps: int, seconds: float) -> dict[str, float]:
        """Tokens per second, and the share of the peak that the model's FLOPs make."""
        tokens_per_second = self.tokens(steps) / seconds
        return {
            "tokens_per_second": tokens_per_second,
            "model_flops_utilization": tokens_per_second * self.flops_per_token / self.peak,
        }

    def result(self, progress: Progress, mixture: Mixture, stopper: Stopper | None) -> TrainingResult:
        """The key figures of a run that has ended."""
        done, history = progress.done, progress.history
        speed = self.speed(done, progress.seconds)
        return TrainingResult(
            final_loss=history.rows[-1]["loss"],
            steps=done,
            tokens=self.tokens(done),
            tokens_per_second=speed["tokens_per_second"],
            seconds=progress.seconds,
            loss_flatness=history.flatness(),
            flops=self.tokens(done) * self.flops_per_token,
            mfu=speed["model_flops_utilization"],
            epochs=mixture.epochs(done, self.config.batch_size),
            last=history.rows[-1],
            stopped_at=done if stopper and stopper.stopped else None,
            best_step=stopper.best_step if stopper else None,
            best_held_out_loss=stopper.best_loss if stopper else None,
        )
