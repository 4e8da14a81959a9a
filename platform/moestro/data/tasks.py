"""Verifiable tasks: procedural problems from reasoning-gym, each with an answer that can be checked.

A problem's side is decided by the hash of its prompt alone: about one in ten is held out, whatever the seed, the
task's arguments or the use, so that what is evaluated was never trained on. Only this module imports reasoning-gym.
"""

import dataclasses
import difflib
import hashlib
import importlib.util
import itertools
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from moestro.artifacts import canonical_json
from moestro.config import TaskConfig
from moestro.data.documents import is_held_out, normalise, text_id
from moestro.errors import ConfigError, InputError, ResourceError

HELD_OUT_FRACTION = 0.1
"""Share of a task's problems that is held out. Fixed, because every stage must agree on it."""

CHUNK = 500
# Draws in a row without a new problem after which a task counts as exhausted: at least this many, and several times
# the problems it has given (a generator with n equally likely problems hides one that long with probability e^-5).
MIN_FRUITLESS, FRUITLESS_PER_PROBLEM = 1000, 5

# Their scorers evaluate the answer as Python or SymPy code. A model's output must not be run: exact match alone counts.
EVALUATING_SCORERS = frozenset({
    "binary_matrix", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication", "puzzle24",
    "simple_integration", "spiral_matrix", "string_insertion",
})  # fmt: skip
# What reasoning-gym's scorers raise on an answer they cannot parse.
UNPARSED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


@dataclass(frozen=True)
class Problem:
    """A question as the model sees it, and its answer. `entry` is what the generator's scorer needs."""

    prompt: str
    answer: str
    entry: dict[str, Any] = field(repr=False, compare=False)

    @property
    def text(self) -> str:
        """The problem with its answer, as it is trained on."""
        return f"{self.prompt} {self.answer}\n"


def is_held_out_prompt(prompt: str) -> bool:
    """Whether the problem with this prompt is held out."""
    return is_held_out(text_id(prompt), HELD_OUT_FRACTION)


class Task:
    """A generator with its arguments."""

    def __init__(self, config: TaskConfig, kind: Any, settings: Any) -> None:
        self.config = config
        self._kind = kind
        self._settings = settings
        self._scorer = self._dataset(0)

    @classmethod
    def open(cls, config: TaskConfig) -> "Task":
        """The task `config` names; raises `ConfigError` for an unknown name and wrong arguments."""
        registered = _registered()
        if config.name not in registered:
            raise ConfigError(
                f"No task is named {config.name!r}.",
                hint=_nearest(config.name, sorted(registered), "reasoning-gym's tasks"),
            )
        kind, settings = registered[config.name]
        # Seed and size are the stage's to choose: a problem is identified by its prompt.
        names = {item.name for item in dataclasses.fields(settings)} - {"seed", "size"}
        for name in config.arguments:
            if name not in names:
                hint = _nearest(name, sorted(names), "Its arguments")
                raise ConfigError(f"Task {config.name!r} has no argument {name!r}.", hint=hint)
        try:
            return cls(config, kind, settings)
        except (AssertionError, TypeError, ValueError) as error:
            raise ConfigError(f"Task {config.name!r} refuses its arguments {config.arguments}: {error}.") from None

    def problems(self, count: int, *, split: Literal["train", "held_out"], seed: int) -> list[Problem]:
        """`count` distinct problems of one side; raises `InputError` if the task has too few."""
        wanted = split == "held_out"
        found: list[Problem] = []
        for problem in self._distinct(seed, set()):
            if is_held_out_prompt(problem.prompt) == wanted:
                found.append(problem)
            if len(found) == count:
                return found
        raise self._too_few(count, len(found), f"{split} problems")

    def both_sides(self, count: int, *, seed: int, seen: set[str]) -> Iterator[Problem]:
        """`count` distinct problems of either side whose prompts are not in `seen`, which grows.

        Raises `InputError` if the task has too few.
        """
        given = 0
        for problem in itertools.islice(self._distinct(seed, seen), count):
            given += 1
            yield problem
        if given < count:
            raise self._too_few(count, given, "problems")

    def score(self, problem: Problem, completion: str) -> float:
        """Reward in [0, 1] of what `completion` says before its first newline; 1 for the very answer.

        Other answers get what the generator's own scorer gives (another form of the right answer, partial credit);
        one that it cannot parse gets 0.
        """
        answer = completion.split("\n", 1)[0].strip()
        if answer == problem.answer:
            return 1.0
        if self.config.name in EVALUATING_SCORERS:
            return 0.0
        try:
            return min(1.0, max(0.0, float(self._scorer.score_answer(answer, problem.entry))))
        except UNPARSED:
            return 0.0

    def _dataset(self, seed: int) -> Any:
        return self._kind(self._settings(**self.config.arguments, seed=seed, size=CHUNK))

    def _distinct(self, seed: int, seen: set[str]) -> Iterator[Problem]:
        """Problems with new prompts until the generator repeats itself."""
        fruitless = given = 0
        for entry in self._draws(seed):
            problem = self._problem(entry)
            if problem.prompt not in seen:
                seen.add(problem.prompt)
                fruitless, given = 0, given + 1
                yield problem
            elif (fruitless := fruitless + 1) > MIN_FRUITLESS + FRUITLESS_PER_PROBLEM * given:
                return

    def _draws(self, seed: int) -> Iterator[dict[str, Any]]:
        """An endless stream of entries. Generators use seed + index, so that nearby seeds would share problems."""
        identity = canonical_json(self.config.identity())
        for chunk in itertools.count():
            digest = hashlib.sha256(f"{identity}:{seed}:{chunk}".encode()).digest()
            dataset = self._dataset(int.from_bytes(digest[:4], "big") >> 1)
            yield from (dataset[index] for index in range(CHUNK))

    def _problem(self, entry: dict[str, Any]) -> Problem:
        answer = entry["answer"]
        if not isinstance(answer, str) or "\n" in answer.strip():
            raise ConfigError(
                f"Task {self.config.name!r} has answers that are not one line of text.",
                hint="Choose a task with short answers, e.g. chain_sum.",
            )
        question = normalise(entry["question"], origin=self.config.name).strip()
        return Problem(f"Question: {question}\nAnswer:", answer.strip(), entry)

    def _too_few(self, count: int, found: int, what: str) -> InputError:
        return InputError(
            f"Task {self.config.name!r} with {self.config.arguments} has only {found} distinct {what}; "
            f"{count} are wanted.",
            hint="Ask for fewer, or widen the task's arguments.",
        )


def _registered() -> dict[str, tuple[Any, Any]]:
    """reasoning-gym's generators: name -> (dataset class, config class)."""
    if "pycosat" not in sys.modules and importlib.util.find_spec("pycosat") is None:
        # A C extension that one logic task needs and reasoning-gym imports always; infra/lock.py leaves it out.
        sys.modules["pycosat"] = _without_pycosat()
    import reasoning_gym  # noqa: F401  (registers the generators)
    from reasoning_gym.factory import DATASETS

    return dict(DATASETS)


def _without_pycosat() -> types.ModuleType:
    def solve(*_: object, **__: object) -> NoReturn:
        raise ResourceError("This task needs pycosat, which is not installed.", hint="Run `pip install pycosat`.")

    module = types.ModuleType("pycosat")
    module.__dict__.update(solve=solve, itersolve=solve)
    return module


def _nearest(name: str, names: list[str], what: str) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"Did you mean {near[0]!r}?" if near else f"{what}: {', '.join(names)}."
