"""`TenaciousEngine`: a rollout engine that is started again once if it dies."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from moestro.errors import LostWorkerError
from moestro.inference.engine import Completion, Engine, EngineConfig, EngineFactory, Sampling, Scored

Found = TypeVar("Found")
RESTARTS = 1
"""Deaths without an answer in between that are survived."""


class TenaciousEngine:
    """An `inference.engine.Engine` that outlives one.

    What it was asked when it died is asked again of a new engine with the same weights: the answer is the same, since
    engines answer by weights, prompts and seed alone.
    """

    def __init__(self, factory: EngineFactory, folder: Path, config: EngineConfig) -> None:
        self._factory, self._folder, self._config = factory, folder, config
        self._engine: Engine = factory(folder, config)
        self.concurrent = self._engine.concurrent
        """Whether it may be asked from another thread while this one computes."""
        self.restarts = 0
        """How often an engine has been started again."""

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[list[Completion]]:
        """See `Engine`."""
        return self._asked(lambda engine: engine.generate(prompts, sampling))

    def score(self, sequences: list[list[int]]) -> list[Scored]:
        """See `Engine`."""
        return self._asked(lambda engine: engine.score(sequences))

    def refresh(self, folder: Path) -> None:
        """See `Engine`."""
        self._folder = folder  # where the weights of an engine that is started from here on lie
        self._asked(lambda engine: engine.refresh(folder))

    def close(self) -> None:
        """See `Engine`."""
        self._engine.close()

    def _asked(self, question: Callable[[Engine], Found]) -> Found:
        for _ in range(RESTARTS):
            try:
                return question(self._engine)
            except LostWorkerError:
                with suppress(LostWorkerError):
                    self._engine.close()
                self._engine = self._factory(self._folder, self._config)
                self.restarts += 1
        return question(self._engine)
