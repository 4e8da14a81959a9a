"""What completions earn: the task's verdict, matches, and users' Python functions, several of them weighted."""

from moestro.rl.rewards.answered import Answered
from moestro.rl.rewards.judging import Judge, Verdicts

__all__ = ["Answered", "Judge", "Verdicts"]
