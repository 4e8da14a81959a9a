"""What can be found wrong before any work is done, beyond what config validation and the plan find."""

from moestro.config import LifecycleConfig
from moestro.data.tasks import Task


def preflight(config: LifecycleConfig) -> None:
    """Make the problems that late steps will ask for.

    Raises `ConfigError` for a task or argument there is none of, `InputError` for a task with too few problems.
    """
    if config.evaluate.task:
        Task.open(config.evaluate.task).problems(config.evaluate.problems, split="held_out", seed=0)
    if config.rl:
        Task.open(config.rl.task).problems(config.rl.prompts_per_step, split="train", seed=0)
