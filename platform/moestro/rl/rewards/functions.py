"""Users' reward functions: loaded from where their path says, called with a time limit."""

import asyncio
import importlib
import importlib.util
import inspect
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from moestro.config import FunctionReward
from moestro.data.rewards import PYTHON, locate
from moestro.errors import ConfigError


class LateError(Exception):
    """A call took longer than it may."""


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
    """Call `function` in a thread of its own; what it returns is awaited if it can be.

    A call that takes longer than `timeout` seconds is waited for no longer; an awaited one is cancelled then and raises
    `LateError`.
    """
    found: Future[Any] = Future()

    def call() -> None:
        try:
            answer = function(**arguments)
            found.set_result(asyncio.run(_limited(answer, timeout)) if inspect.isawaitable(answer) else answer)
        except BaseException as error:
            found.set_exception(error)
            if not isinstance(error, Exception):
                raise

    threading.Thread(target=call, daemon=True).start()
    return found


async def _limited(answer: Awaitable[Any], timeout: float) -> Any:
    try:
        async with asyncio.timeout(timeout) as limit:
            return await answer
    except TimeoutError as error:
        if limit.expired():
            raise LateError from error
        raise  # the function's own


def _from_file(path: Path) -> Any:
    name = f"moestro_reward_{path.stem}_{abs(hash(path.resolve()))}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
