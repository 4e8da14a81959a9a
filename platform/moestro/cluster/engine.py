"""A rollout engine in a Ray actor."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moestro.cluster.causes import cause_of
from moestro.errors import LostWorkerError, StoppedError
from moestro.inference.engine import EngineConfig

if TYPE_CHECKING:
    from moestro.cluster.connection import Cluster


class RemoteEngine:
    """An `inference.engine.Engine` whose work is done in a Ray actor."""

    concurrent = True

    def __init__(self, cluster: "Cluster", host: Any) -> None:
        self._cluster = cluster
        self._host = host

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            import ray

            try:
                with self._cluster.using():
                    return ray.get(self._host.call.remote(method, args, kwargs))
            except ray.exceptions.RayTaskError as error:
                raise cause_of(error) from None
            except ray.exceptions.RayActorError as error:
                # Ray's first lines say which actor, the last one why.
                raise LostWorkerError(
                    f"The rollout engine died: {str(error).strip().splitlines()[-1]}",
                    hint="Run the same command again: it resumes from the last update.",
                ) from error

        return call

    def close(self) -> None:
        """End the actor and the engine in it, whether or not it still lives."""
        import ray

        with suppress(StoppedError), self._cluster.using():
            ray.kill(self._host)


class EngineHost:
    """The actor around a vLLM engine."""

    def __init__(self, folder: Path, config: EngineConfig) -> None:
        from moestro.inference.engine import VllmEngine

        self.engine = VllmEngine(folder, config)

    def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return getattr(self.engine, method)(*args, **kwargs)
