"""`Answered`: what a reward sees."""

from dataclasses import dataclass

from moestro.data.tasks import Problem


@dataclass(frozen=True)
class Answered:
    """Completions of one step, those of a problem side by side."""

    problems: list[Problem]
    """The problem of each completion."""
    completions: list[str]
    """Decoded, without special tokens."""
    completion_ids: list[list[int]]

    def __len__(self) -> int:
        """Completions."""
        return len(self.completions)
