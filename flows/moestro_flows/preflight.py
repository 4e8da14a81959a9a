"""What can be found wrong before any work is done, beyond what config validation and the plan find."""

from moestro.config import LifecycleConfig
from moestro.data.tasks import Task


def preflight(config: LifecycleConfig) -> None:
    """Open the tasks that are answered late in the walk; raises `ConfigError` or `InputError` naming the mistake."""
    for task in (config.evaluate.task, config.rl.task if config.rl else None):
        if task is not None:
            Task.open(task).problems(1, split="held_out", seed=0)
