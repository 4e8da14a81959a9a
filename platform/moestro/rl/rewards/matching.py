"""Rewards that compare a completion with the answer: by the task's verifier, to the letter, as a number."""

import math
import re

from moestro.data.tasks import Task
from moestro.rl.rewards.answered import Answered

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*)?\.?\d+(?:[eE][-+]?\d+)?")


def verified(task: Task, answered: Answered) -> list[float | None]:
    """1 for what the task takes for right, 0 for anything else, whatever credit the task would give it."""
    return [float(score == 1.0) for score in _scores(task, answered)]


def graded(task: Task, answered: Answered) -> list[float | None]:
    """The task's own score in [0, 1]."""
    return list(_scores(task, answered))


def exact_match(answered: Answered) -> list[float | None]:
    """1 if the first line of the completion is the answer."""
    return [
        float(_first_line(completion) == problem.answer)
        for problem, completion in zip(answered.problems, answered.completions, strict=True)
    ]


def numeric(tolerance: float, answered: Answered) -> list[float | None]:
    """1 if the last number of the completion is the answer's, 0 without one; None where the answer is no number."""
    return [
        _equal(problem.answer, completion, tolerance)
        for problem, completion in zip(answered.problems, answered.completions, strict=True)
    ]


def _scores(task: Task, answered: Answered) -> list[float]:
    pairs = zip(answered.problems, answered.completions, strict=True)
    return [task.score(problem, completion) for problem, completion in pairs]


def _first_line(completion: str) -> str:
    return completion.split("\n", 1)[0].strip()


def _equal(answer: str, completion: str, tolerance: float) -> float | None:
    wanted, found = _last_number(answer), _last_number(completion)
    if wanted is None:
        return None
    return float(found is not None and math.isclose(found, wanted, rel_tol=tolerance, abs_tol=0.0))


def _last_number(text: str) -> float | None:
    numbers = _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None
