"""Training that cannot go on: a loss or gradient that is not finite, or a loss that rises and stays up."""

import math
from collections import Counter
from statistics import median

from moestro.data.packed import Batch
from moestro.errors import TrainingError

HINT = "Lower `learning_rate` or raise `warmup_steps`; the checkpoints before it are kept."
WINDOW = 32
"""Steps whose median loss is looked at: a spike that has passed by then is none."""
ABOVE_BEST = 2.0
ABOVE_FIRST = 4.0
ABOVE_UNIFORM = 1.0


def check_finite(step: int, loss: float, norm: float, batch: Batch, domains: list[str]) -> None:
    """Raise `TrainingError` naming step (from 0) and batch if its loss or its gradient's norm is not finite."""
    if math.isfinite(loss) and math.isfinite(norm):
        return
    counts = Counter(domains[domain] for domain in batch.domains_B.tolist())
    sequences = ", ".join(f"{name} ({count} sequences)" for name, count in sorted(counts.items()))
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
    raise TrainingError(f"Training stopped at step {step + 1}: {what}. Its batch: {sequences}.", hint=HINT)


class DivergenceGuard:
    """Watches the losses of a run. It has diverged if the median of the last 32 steps is above any of

    - the lowest median of 32 steps before, by 2 nats: what was learnt is lost,
    - the loss of the first batch, by 4 nats: it broke before there was a median to compare with,
    - the loss of guessing evenly, ln V, or of the first batch if that is higher, by 1 nat: worse than knowing nothing.

    Losses of single batches differ, by domain above all, and spikes of warm-up pass: hence medians and wide margins.
    A pure function of the losses, so a resumed run judges as an undisturbed one.
    """

    def __init__(self, vocabulary: int, losses: list[float]) -> None:
        """`vocabulary`: V. `losses`: one per step of the run so far."""
        self.uniform = math.log(vocabulary)
        self.losses: list[float] = []
        self.best = math.inf
        for loss in losses:
            self._add(loss)

    def watch(self, loss: float) -> None:
        """Take the next step's loss; raises `TrainingError` if the run has diverged."""
        now = self._add(loss)
        first = self.losses[0]
        limits = {
            f"the lowest such median was {self.best:.2f}": self.best + ABOVE_BEST,
            f"the first batch's loss was {first:.2f}": first + ABOVE_FIRST,
            f"guessing evenly costs {self.uniform:.2f}": max(self.uniform, first) + ABOVE_UNIFORM,
        }
        than, limit = min(limits.items(), key=lambda item: item[1])
        if now > limit:
            raise TrainingError(
                f"Training diverged by step {len(self.losses)}: the median loss of the last {WINDOW} steps is "
                f"{now:.2f} nats per token, {than}.",
                hint=HINT,
            )

    def _add(self, loss: float) -> float:
        """The present median; -inf as long as there are too few steps."""
        self.losses.append(loss)
        if len(self.losses) < WINDOW:
            return -math.inf
        now = median(self.losses[-WINDOW:])
        self.best = min(self.best, now)
        return now
