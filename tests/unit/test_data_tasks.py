"""Verifiable tasks: distinct problems, sides that never meet, scores, and errors that name the nearest."""

import importlib

import pytest

from moestro.config import TaskConfig
from moestro.data.tasks import EVALUATING_SCORERS, Task
from moestro.errors import ConfigError, InputError, ResourceError

SMALL = TaskConfig(name="chain_sum", arguments={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2})


@pytest.fixture(scope="module")
def task() -> Task:
    return Task.open(SMALL)


def test_problems_are_distinct_and_the_sides_disjoint_for_every_seed(task: Task) -> None:
    train: set[str] = set()
    held_out: set[str] = set()
    for seed in range(4):
        for side, prompts in (("train", train), ("held_out", held_out)):
            found = [problem.prompt for problem in task.problems(200, split=side, seed=seed)]  # type: ignore[arg-type]
            assert len(set(found)) == 200
            prompts |= set(found)
    assert not train & held_out
    other = Task.open(TaskConfig(name="chain_sum", arguments={"max_terms": 3, "max_digits": 2}))
    assert not {problem.prompt for problem in other.problems(300, split="held_out", seed=9)} & train


def test_problems_are_a_function_of_the_seed(task: Task) -> None:
    first = task.problems(50, split="train", seed=3)
    assert first == Task.open(SMALL).problems(50, split="train", seed=3)
    assert first == task.problems(100, split="train", seed=3)[:50]
    neighbours = {problem.prompt for problem in task.problems(50, split="train", seed=4)}
    assert len({problem.prompt for problem in first} & neighbours) < 10


def test_the_prompt_is_a_question_and_its_text_is_scored_right(task: Task) -> None:
    for problem in task.problems(20, split="train", seed=0):
        assert problem.prompt.startswith("Question: ")
        assert problem.prompt.endswith("\nAnswer:")
        assert problem.text == f"{problem.prompt} {problem.answer}\n"
        assert task.score(problem, problem.text.removeprefix(problem.prompt)) == 1.0


def test_score_reads_one_line(task: Task) -> None:
    problem = task.problems(1, split="train", seed=0)[0]
    assert task.score(problem, f"  {problem.answer} \nQuestion: 1 + 1\n") == 1.0
    assert task.score(problem, f"{problem.answer}.0") == 1.0
    assert task.score(problem, "none") == 0.0
    assert task.score(problem, "") == 0.0
    assert task.score(problem, f"\n{problem.answer}") == 0.0
    assert 0.0 < task.score(problem, f"maybe {problem.answer}") < 1.0


def test_an_answer_the_scorer_cannot_parse_scores_nothing() -> None:
    task = Task.open(TaskConfig(name="prime_factorization"))
    problem = task.problems(1, split="train", seed=0)[0]
    assert task.score(problem, "no number") == 0.0


def test_answers_are_never_evaluated_as_code(tmp_path_factory: pytest.TempPathFactory) -> None:
    target = tmp_path_factory.mktemp("code") / "ran"
    for name in ("spiral_matrix", "string_insertion"):
        assert name in EVALUATING_SCORERS
        task = Task.open(TaskConfig(name=name))
        problem = task.problems(1, split="train", seed=0)[0]
        assert task.score(problem, f"[__import__('pathlib').Path({str(target)!r}).touch()]") == 0.0
        assert task.score(problem, problem.answer) == 1.0
    assert not target.exists()


def test_too_few_problems_are_counted() -> None:
    tiny = Task.open(TaskConfig(name="products", arguments={"max_digits": 1, "max_terms": 2}))
    with pytest.raises(InputError, match="has only 100 distinct problems; 101 are wanted"):
        list(tiny.both_sides(101, seed=0, seen=set()))
    assert len(list(tiny.both_sides(100, seed=0, seen=set()))) == 100
    with pytest.raises(InputError, match="distinct held_out problems"):
        tiny.problems(90, split="held_out", seed=0)


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("chainsum", {}, "Did you mean 'chain_sum'"),
        ("chain_sum", {"max_digit": 2}, "Did you mean 'max_digits'"),
        ("chain_sum", {"seed": 2}, "has no argument 'seed'"),
        ("chain_sum", {"min_terms": 3, "max_terms": 2}, "max_terms must be >= min_terms"),
        ("chain_sum", {"min_terms": "two"}, "refuses its arguments"),
    ],
)
def test_wrong_names_and_arguments_are_explained(name: str, arguments: dict[str, int | str], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        Task.open(TaskConfig(name=name, arguments=arguments))
    assert said in str(error.value)


def test_tasks_without_one_line_answers_are_refused() -> None:
    with pytest.raises(ConfigError, match="not one line"):
        Task.open(TaskConfig(name="mini_sudoku")).problems(1, split="train", seed=0)


def test_what_needs_pycosat_says_so(task: Task) -> None:
    pycosat = importlib.import_module("pycosat")
    if not hasattr(pycosat, "__file__"):
        with pytest.raises(ResourceError, match="needs pycosat"):
            pycosat.solve([[1]])
