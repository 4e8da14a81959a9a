"""Users' reward functions: loaded from where their path says, called with a time limit."""

import asyncio
import importlib
import importlib.util
import inspect
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from moestro.config import FunctionReward
from moestro.data.rewards import PYTHON, locate
from moestro.errors import ConfigError


def load(reward: FunctionReward) -> Callable[..., Any]:
    """The function; raises `ConfigError` if it is not where its path says, or importing it fails."""
    where, _, name = reward.path.partition(":")
    source = locate(reward)
    try:
        module = _from_file(source) if where.endswith(PYTHON) else importlib.import_module(where)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"rl.rewards: {where} cannot be imported: {type(error).__name__}: {error}.") from error
    function = getattr(module, name, None)
    if not callable(function):
        named = ", ".join(sorted(key for key, value in vars(module).items() if inspect.isfunction(value)))
        raise ConfigError(
            f"rl.rewards: {where} has no function {name!r}.", hint=f"It has {named}." if named else "It has none."
        )
    return function


def start(function: Callable[..., Any], arguments: Mapping[str, Any], timeout: float) -> Future[Any]:
    """Call `function`, which may be async, in a thread of its own.

    A call that takes longer than `timeout` seconds is waited for no longer; an async one is cancelled then.
    """
    found: Future[Any] = Future()

    async def limited() -> Any:
        return await asyncio.wait_for(function(**arguments), timeout)

    def call() -> None:
        try:
            is_async = inspect.iscoroutinefunction(function)
            found.set_result(asyncio.run(limited()) if is_async else function(**arguments))
        except BaseException as error:
            found.set_exception(error)
            if not isinstance(error, Exception):
                raise

    threading.Thread(target=call, daemon=True).start()
    return found


def _from_file(path: Path) -> Any:
    name = f"moestro_reward_{path.stem}_{abs(hash(path.resolve()))}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
