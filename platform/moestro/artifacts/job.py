"""What a stage is handed besides its config and inputs: where to write, whom to tell, how much to use."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from moestro.config.lifecycle import Resources


class Reporter(Protocol):
    """Where a stage's progress and metrics go. Stages never know whether MLflow, a terminal or nothing listens."""

    def progress(self, done: int, total: int, message: str = "") -> None:
        """`done` of `total` units of work, with a short remark such as the current loss."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Named figures at a step."""


class SilentReporter:
    """Listens to nothing."""

    def progress(self, done: int, total: int, message: str = "") -> None:
        """Ignore."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Ignore."""


@dataclass(frozen=True)
class Job:
    """One attempt at a stage. Only `out` bears the result; nothing in here enters identity."""

    out: Path
    """Existing, empty directory to fill."""
    scratch: Path
    """Existing directory that survives interruptions: the place of training checkpoints."""
    reporter: Reporter = field(default_factory=SilentReporter)
    """Told about progress."""
    resources: Resources = field(default_factory=Resources)
    """What may be used; `resources.cpus` has been resolved to this stage's own share of cores."""
    digests: dict[str, str] = field(default_factory=dict)
    """BLAKE3 (hex) of files in `out`, by relative path, that were digested while written; others are read again."""
