"""`Ahead`: rollouts are sampled while the trainer trains, by as many updates early as `max_staleness` allows.

With staleness k the rollouts of step s come from the policy that has had max(0, s - k) updates, whether or not the
engine can work beside the trainer: what is sampled does not depend on how fast anybody is.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from moestro.rl.engine import TenaciousEngine
from moestro.rl.sampling import Sampled, Sampler


class Ahead:
    """Hands out the rollouts of each step. While the block lasts, at most one thread samples."""

    def __init__(self, sampler: Sampler, engine: TenaciousEngine) -> None:
        self._sampler, self._engine = sampler, engine
        self._staleness, self._steps = sampler.config.max_staleness, sampler.config.steps
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._running: Future[Sampled] | None = None
        self.finished: list[Sampled] = []
        """Sampled since this was last emptied."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._sampler.records.close()

    def take(self, step: int) -> Sampled:
        """The rollouts of `step` (from 0); those that its policy samples for a later one are begun.

        Raises what `Sampler.obtain` raises.
        """
        for early in range(step, min(step + max(1, self._staleness), self._steps)):
            self._obtain(early, step)
        sampled = self._sampler.obtain(self._engine, step, version=step)  # is there now
        later = step + self._staleness
        if self._staleness and later < self._steps:
            if self._engine.concurrent:
                self._running = self._pool.submit(self._obtain, later, step)
            else:
                self._obtain(later, step)
        return sampled

    def settle(self) -> None:
        """Wait until nothing is sampled any more and all is on disk: the policy may change. Raises what sampling or
        writing raised."""
        if self._running is not None:
            self._running.result()
            self._running = None
        self._sampler.records.settle()

    def _obtain(self, step: int, version: int) -> Sampled:
        sampled = self._sampler.obtain(self._engine, step, version=version)
        if sampled.seconds is not None:
            self.finished.append(sampled)
        return sampled
