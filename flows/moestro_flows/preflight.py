"""What can be found wrong before the work that it would spoil, beyond what config validation and the plan find."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from moestro.artifacts import Artifact
from moestro.config import BranchConfig, FunctionReward, LifecycleConfig, RlConfig, TrainingConfig
from moestro.data.tasks import Task
from moestro.errors import ConfigError

if TYPE_CHECKING:
    from moestro.data.packed import Mixture


def preflight(config: LifecycleConfig) -> None:
    """Make the problems that late steps will ask for, and import the functions that will judge, before any work.

    Raises `ConfigError` for a task, argument or function there is none of, `InputError` for a task with too few
    problems.
    """
    if config.evaluate.task:
        Task.open(config.evaluate.task).problems(config.evaluate.problems, split="held_out", seed=0)
    if isinstance(config.rl, RlConfig):
        Task.open(config.rl.task).problems(config.rl.prompts_per_step, split="train", seed=0)
        _import_rewards(config.rl)


def _import_rewards(config: RlConfig) -> None:
    functions = [reward for reward in config.rewards if isinstance(reward, FunctionReward)]
    if functions:
        from moestro.rl.rewards.functions import load

        for reward in functions:
            load(reward)


def check_text(config: LifecycleConfig, tokens: Mapping[str, Artifact], steps: frozenset[str]) -> None:
    """Whether the domains' `tokens` are enough for those of `steps` that train on them, before the first does.

    Where a budget does not say how many steps it makes, the stage itself finds out. Raises one `ConfigError` for all
    steps that a domain runs out of data in, `InputError` for a domain that does not fill a sequence.
    """
    from moestro.training.plan import MORE_TEXT, shortage

    lacks = [
        f"{step}: {lack}"
        for step, training, mixture in _trainings(config, tokens, steps)
        if training.known_steps is not None and (lack := shortage(mixture, training, training.known_steps))
    ]
    if lacks:
        raise ConfigError("\n".join(lacks), hint=MORE_TEXT)


def _trainings(
    config: LifecycleConfig, tokens: Mapping[str, Artifact], steps: frozenset[str]
) -> Iterator[tuple[str, TrainingConfig, "Mixture"]]:
    """Those of `steps` that train on `tokens`: their names, how long they train, and on what."""
    from moestro.branching.training import branch_mixture
    from moestro.tuning import tune_mixture

    for name, branch in config.branch_configs().items():
        if isinstance(branch, BranchConfig) and f"branch {name}" in steps:
            general = {other: tokens[other] for other in config.general_text(name)}
            yield f"branch {name}", branch.training, branch_mixture(branch, tokens[name], general)
    if config.tune and "tune" in steps:
        yield "tune", config.tune.training, tune_mixture(config.tune, tokens)
