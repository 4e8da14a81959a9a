"""`Judge`: all rewards of a run, asked together about the completions of a step.

Shapes: N prompts, G completions per prompt, F reward functions.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from moestro.config import FunctionReward, GradedReward, NumericReward, RewardConfig, VerifiedReward
from moestro.data.tasks import Task
from moestro.errors import ConfigError, InputError
from moestro.rl.rewards.answered import Answered
from moestro.rl.rewards.functions import LateError, load, start
from moestro.rl.rewards.matching import exact_match, graded, numeric, verified

LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class _PassedOver:
    """In place of the rewards of a call that failed and may."""

    why: str


@dataclass(frozen=True)
class Verdicts:
    """Rewards of a step."""

    by_function_FNG: Tensor
    """float32, NaN where a function has no say."""
    total_NG: Tensor
    """Their weighted sum, float32; NaN where none has a say."""
    failures: int
    """Calls that raised or took too long, and were passed over."""


class Judge:
    """The rewards that a config lists."""

    def __init__(self, configs: Sequence[RewardConfig], task: Task) -> None:
        """Raises `ConfigError` for a function that cannot be found, or two rewards of one name."""
        self.names = [_name(config) for config in configs]
        for name in self.names:
            if self.names.count(name) > 1:
                raise ConfigError(f"rl.rewards: two of them are named {name!r}.", hint="Keep one, with another weight.")
        self._configs = tuple(configs)
        self.may_fail = any(isinstance(config, FunctionReward) for config in configs)
        """Whether one of them is not Moestro's own: it may raise, or take long."""
        self._functions = [_function(config, task) for config in configs]

    def judge(self, answered: Answered, *, step: int, group: int) -> Verdicts:
        """What the completions earned; `group` of them answer the same problem.

        Raises `InputError` naming function and step for one that raises (unless the config says to pass it over), or
        that answers with anything but a list of as many rewards, or with one that is no finite float32; and if none
        judges any of the completions.
        """
        columns: dict[str, list[Any]] = {
            "answer": [problem.answer for problem in answered.problems],
            "step": [step] * len(answered),
        }
        running = {
            number: start(function, _arguments(answered, columns), config.timeout_seconds)
            for number, (config, function) in enumerate(zip(self._configs, self._functions, strict=True))
            if isinstance(config, FunctionReward)
        }
        found, passed_over = [], list[str]()
        for number, (config, function) in enumerate(zip(self._configs, self._functions, strict=True)):
            rewards = (
                self._result(config, running[number], step)
                if isinstance(config, FunctionReward)
                else function(answered)
            )
            if isinstance(rewards, _PassedOver):
                passed_over.append(rewards.why)
                rewards = [None] * len(answered)
            found.append(_checked(rewards, len(answered), self.names[number], step))
        by_function_FNG = torch.tensor(found).reshape(len(found), -1, group)
        weights_F11 = torch.tensor([config.weight for config in self._configs])[:, None, None]
        silent_NG = by_function_FNG.isnan().all(dim=0)
        if silent_NG.all():
            _raise_unjudged(step, len(answered), passed_over)
        total_NG = (by_function_FNG * weights_F11).nansum(dim=0)
        return Verdicts(by_function_FNG, torch.where(silent_NG, torch.nan, total_NG), len(passed_over))

    def _result(self, config: FunctionReward, running: Future[Any], step: int) -> Any:
        """What the function returned; `_PassedOver` if it failed and may."""
        try:
            error = running.exception(config.timeout_seconds)
        except TimeoutError:
            error = LateError()
        if error is None:
            return running.result()
        late = isinstance(error, LateError)
        what = f"took more than {config.timeout_seconds:g} s" if late else f"raised {type(error).__name__}: {error}"
        if config.on_failure == "none" and isinstance(error, Exception):
            return _PassedOver(f"{config.path} {what}")
        raise InputError(
            f"rl step {step}: reward {config.path} {what}.",
            hint="Run the same command again and it resumes there; with another file it begins anew, for its contents "
            "are identity. `on_failure: none` passes such calls over.",
        ) from error


def _raise_unjudged(step: int, count: int, passed_over: list[str]) -> NoReturn:
    why = f" ({'; '.join(passed_over)})" if passed_over else ""
    raise InputError(
        f"rl step {step}: no reward judged any of the {count} completions{why}: there is nothing to learn from.",
        hint="Run the same command again and it resumes there; or add a reward that always has a say.",
    )


def _name(config: RewardConfig) -> str:
    return config.path.partition(":")[2] if isinstance(config, FunctionReward) else config.type


def _function(config: RewardConfig, task: Task) -> Callable[..., Any]:
    if isinstance(config, FunctionReward):
        return load(config)
    if isinstance(config, VerifiedReward):
        return partial(verified, task)
    if isinstance(config, GradedReward):
        return partial(graded, task)
    if isinstance(config, NumericReward):
        return partial(numeric, config.tolerance)
    return exact_match


def _arguments(answered: Answered, columns: dict[str, list[Any]]) -> dict[str, Any]:
    return {
        "prompts": [problem.prompt for problem in answered.problems],
        "completions": list(answered.completions),
        "completion_ids": [list(ids) for ids in answered.completion_ids],
        **columns,
    }


def _checked(rewards: Any, count: int, name: str, step: int) -> list[float]:
    given = rewards.tolist() if isinstance(rewards, np.ndarray | Tensor) else rewards
    a_list = isinstance(given, Sequence) and not isinstance(given, str)
    if not a_list or len(given) != count:
        kind = "nothing" if rewards is None else f"a {type(rewards).__name__}"
        said = f"{len(given)} rewards" if a_list else kind
        raise InputError(
            f"rl step {step}: reward {name} returned {said} for {count} completions.",
            hint="It has to return a list with a number, or None, for each completion.",
        )
    values = []
    for position, reward in enumerate(given):
        try:
            value = math.nan if reward is None else float(reward)
        except (OverflowError, TypeError, ValueError):
            value = math.inf
        if reward is not None and not abs(value) <= LARGEST:
            raise InputError(
                f"rl step {step}: reward {name} gave completion {position} {reward!r}, which is no finite number of "
                "float32.",
                hint="Return None for a completion that it cannot judge.",
            )
        values.append(value)
    return values
