"""Training that cannot go on: what is not finite, a loss that rises and stays up, weights that the last step broke."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn

from moestro.data.packed import Source
from moestro.errors import TrainingError
from moestro.training.state import trained_tensors

HINT = "Lower `learning_rate` or raise `warmup_steps`: the same config ends the same way."
DATA_HINT = (
    "Look at these windows. If they are sound, lower `learning_rate` or raise `warmup_steps`: the same config and \
data end the same way."
)
WINDOW = 32
"""Steps whose median loss is looked at: a spike that has passed by then is none."""
RECENT = 8
"""Steps that say how it stands just now: at the end of a run, and of a checkpoint."""
ABOVE_BEST = 2.0
ABOVE_FIRST = 4.0
ABOVE_UNIFORM = 1.0
UNLEARNT = 0.9
"""Of what was learnt below ln V; where that was more than `LEARNT` nats, losing this share of it is enough."""
LEARNT = 1.0
NEAR_BEST = 1.0
"""Nats above the best that a checkpoint's loss may be for it to count as good."""
NAMED_WINDOWS = 4
"""Of each domain in a message."""


def check_finite(
    step: int, loss: float, norm: float, sources: list[Source], at_fault: Callable[[], Sequence[str]]
) -> None:
    """Raise `TrainingError` naming step (from 0) and batch if its loss or its gradient's norm is not finite.

    `at_fault` is asked where only the latter is not: it says which losses beside the cross entropy, if any, make it so.
    """
    if math.isfinite(loss) and math.isfinite(norm):
        return
    if math.isfinite(loss) and (terms := at_fault()):
        names = " and ".join(terms)
        raise TrainingError(
            f"Training stopped at step {step + 1}: {names} of tune.losses {'makes' if len(terms) == 1 else 'make'} the "
            f"gradient's norm {norm}. Without, it is finite.",
            hint=f"Lower the `coefficient` of {names}: the same config ends the same way.",
        )
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
    raise TrainingError(
        f"Training stopped at step {step + 1}: {what}. Its batch: {named_windows(sources)}.", hint=DATA_HINT
    )


def check_weights(done: int, model: nn.Module) -> None:
    """Raise `TrainingError` naming a weight that is not finite after `done` finished steps."""
    for name, value in trained_tensors(model).items():
        if not torch.isfinite(value).all():
            raise TrainingError(f"The update of step {done} left values in {name} that are not finite.", hint=HINT)


def named_windows(sources: list[Source]) -> str:
    """The windows by domain, a few of each."""
    windows: dict[str, list[int]] = {}
    for source in sources:
        windows.setdefault(source.domain, []).append(source.window)
    parts = []
    for name, numbers in sorted(windows.items()):
        more = f" and {len(numbers) - NAMED_WINDOWS} more" if len(numbers) > NAMED_WINDOWS else ""
        noun = "window" if len(numbers) == 1 else "windows"
        parts.append(f"{name} ({noun} {', '.join(map(str, numbers[:NAMED_WINDOWS]))}{more})")
    return ", ".join(parts)


class DivergenceGuard:
    """Watches the losses of a run. It has diverged if the median of the last 32 steps is above any of

    - the lowest median of 32 steps before, by 2 nats: what was learnt is lost. A small vocabulary leaves less room: if
      that was more than 1 nat below the loss of guessing evenly, ln V, nine tenths of the way back are enough,
    - the loss of the first batch, by 4 nats: it broke before there was a median to compare with,
    - the loss of guessing evenly, or of the first batch if that is higher, by 1 nat: worse than knowing nothing.

    Losses of single batches differ, by domain above all, and spikes of warm-up pass: hence medians and wide margins. A
    run that has ended cannot recover any more, so at its end the last 8 steps decide. A median of 8 says less than one
    of 32, therefore even the lowest of them has to be above a limit.
    A pure function of the losses, so a resumed run judges as an undisturbed one.
    """

    def __init__(self, vocabulary: int, losses: list[float]) -> None:
        """`vocabulary`: V. `losses`: one per step of the run so far."""
        self.uniform = math.log(vocabulary)
        self.losses: list[float] = []
        self._long, self._short = _Lowest(WINDOW), _Lowest(RECENT)
        self._good: list[bool] = []
        for loss in losses:
            self._add(loss)

    def watch(self, loss: float) -> None:
        """Take the next step's loss; raises `TrainingError` if the run has diverged."""
        self._add(loss)
        if self._long.now is not None:
            self._judge(
                self._long.now, self._long, f"by step {len(self.losses)}: the median loss of the last {WINDOW} steps"
            )

    def finish(self) -> None:
        """Judge the run by its last steps; raises `TrainingError` if it has diverged in them.

        Of fewer than 16 steps there is nothing to compare the last 8 with: their weights are judged by `check_outcome`.
        """
        if len(self.losses) >= 2 * RECENT:
            self._judge(
                min(self.losses[-RECENT:]), self._short, f"by its end: the lowest loss of the last {RECENT} steps"
            )

    def check_outcome(self, step: int, after: float, norm: float) -> None:
        """Raise `TrainingError` if the weights that the run ends with are worse on the batch of `step` (from 0) than
        those it found: by the loss `after`, as for medians, or by a gradient's norm that is not finite.

        One batch is compared with itself, so how batches differ plays no part.
        """
        before = self.losses[step]
        if after <= before + self._room(before) and math.isfinite(norm):
            return
        raise TrainingError(
            f"Training ended with broken weights: with them the batch of step {step + 1} costs {after:.2f} nats per "
            f"token and has a gradient of norm {norm:.3g}; at that step it cost {before:.2f}.",
            hint=HINT,
        )

    def good(self, done: int) -> bool:
        """Whether the weights after `done` steps are known to be good: the next batch's loss and the median of the last
        8 up to it were within 1 nat of the best until then.

        Known once that batch is through; later losses do not change it.
        """
        return done < len(self._good) and self._good[done]

    def _judge(self, now: float, lowest: "_Lowest", what: str) -> None:
        than, limit = min(self._limits(lowest).items(), key=lambda item: item[1])
        if now > limit:
            raise TrainingError(f"Training diverged {what} is {now:.2f} nats per token, {than}.", hint=HINT)

    def _limits(self, lowest: "_Lowest") -> dict[str, float]:
        """The losses that are too high, by what is said of them."""
        first, best = self.losses[0], lowest.median
        return {
            f"the lowest median of {lowest.size} steps was {best:.2f}": best + self._room(best),
            f"the first batch's loss was {first:.2f}": first + ABOVE_FIRST,
            f"guessing evenly costs {self.uniform:.2f}": max(self.uniform, first) + ABOVE_UNIFORM,
        }

    def _room(self, best: float) -> float:
        """How far a loss may rise above `best`."""
        learnt = self.uniform - best
        return min(ABOVE_BEST, UNLEARNT * learnt) if learnt > LEARNT else ABOVE_BEST

    def _add(self, loss: float) -> None:
        self.losses.append(loss)
        self._long.add(self.losses)
        self._short.add(self.losses)
        self._good.append(self._is_good(loss))

    def _is_good(self, loss: float) -> bool:
        """Of the weights whose loss has just come."""
        short = self._short
        if short.now is None:
            return loss <= self.losses[0] + NEAR_BEST
        limit = min(short.median + NEAR_BEST, *self._limits(short).values())
        return short.now <= limit and loss <= short.high + NEAR_BEST


@dataclass
class _Lowest:
    """The lowest median of so many losses in a row."""

    size: int
    median: float = math.inf
    high: float = math.inf
    """The last but one of the losses of that median, by size: what an ordinary batch may cost."""
    now: float | None = None
    """The present median; None as long as there are too few losses."""

    def add(self, losses: list[float]) -> None:
        """Take the last of `losses`."""
        if len(losses) < self.size:
            return
        window = sorted(losses[-self.size :])
        self.now = median(window)
        if self.now < self.median:
            self.median, self.high = self.now, window[-2]
