"""`TenaciousEngine`: a rollout engine that is started again if it dies, once over the same question."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from moestro.errors import LostWorkerError
from moestro.inference.engine import Completion, Engine, EngineConfig, EngineFactory, Sampling, Scored

Found = TypeVar("Found")
RESTARTS = 1
"""Deaths over one question that are survived. There is no limit over a run, in which each answer is progress."""


def count_restarts(log: Path) -> int:
    """How often an engine has been started again, by the `log` of a `TenaciousEngine`."""
    return len(log.read_text().splitlines()) if log.is_file() else 0


class TenaciousEngine:
    """An `inference.engine.Engine` that outlives one.

    What it was asked when it died is asked again of a new engine with the same weights: the answer is the same, since
    engines answer by weights, prompts and seed alone.
    """

    def __init__(self, factory: EngineFactory, folder: Path, config: EngineConfig, *, log: Path) -> None:
        """`log` gets a line for each restart: a file, so that a run that is resumed goes on counting."""
        self._factory, self._folder, self._config, self._log = factory, folder, config, log
        self._engine: Engine = factory(folder, config)
        self.concurrent = self._engine.concurrent
        """Whether it may be asked from another thread while this one computes."""

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
            except LostWorkerError as error:
                with suppress(LostWorkerError):
                    self._engine.close()
                self._engine = self._factory(self._folder, self._config)
                with self._log.open("a") as log:
                    log.write(" ".join(str(error).split()) + "\n")
        return question(self._engine)
