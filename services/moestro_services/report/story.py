"""`Story`: what the records say about one run, in the order in which the lifecycle tells it."""

import json
from dataclasses import dataclass, field
from typing import Any

from moestro.artifacts import LifecycleRun, StepRun
from moestro_services.catalog import Catalog, Entry

MEASUREMENTS = ("evaluate", "profile")


@dataclass(frozen=True)
class Told:
    """One step and its artifact, if it is still in the store."""

    step: StepRun
    entry: Entry | None

    @property
    def subject(self) -> str:
        """The checkpoint a measurement is about: `mix` for `evaluate mix`."""
        return self.step.name.removeprefix(f"{self.step.stage} ")

    @property
    def result(self) -> dict[str, Any]:
        """Key figures, empty without an artifact."""
        return self.entry.record.result if self.entry else {}

    @property
    def work_seconds(self) -> float:
        """Wall time of the work, also if it was done in an earlier run."""
        return self.entry.record.seconds if self.entry else self.step.seconds


@dataclass(frozen=True)
class Story:
    """One run."""

    run: LifecycleRun
    steps: tuple[Told, ...]
    evaluations: dict[str, Told] = field(default_factory=dict)
    """By the checkpoint they are about, in the lifecycle's order."""
    profiles: dict[str, Told] = field(default_factory=dict)
    """Likewise."""

    @classmethod
    def of(cls, catalog: Catalog, run: LifecycleRun) -> "Story":
        """The story of `run`. Steps stand in the order in which their inputs were made, not in which they ended."""
        told = [Told(step, catalog.by_fingerprint.get(step.fingerprint)) for step in run.steps]
        steps = tuple(sorted(told, key=lambda item: _depth(catalog, item.step.fingerprint)))
        checkpoints = [item.step.name for item in steps if item.step.stage not in MEASUREMENTS]
        measured = {
            stage: {
                item.subject: item
                for item in sorted(steps, key=lambda item: _position(checkpoints, item.subject))
                if item.step.stage == stage and item.entry
            }
            for stage in MEASUREMENTS
        }
        return cls(run, steps, measured["evaluate"], measured["profile"])

    def named(self, stage: str) -> Told | None:
        """The run's step of a stage that it has once."""
        return next((item for item in self.steps if item.step.stage == stage and item.entry), None)

    def history(self, stage: str) -> dict[str, list[dict[str, Any]]]:
        """The training histories of the steps of `stage`, by step."""
        found = {}
        for item in self.steps:
            path = item.entry.path / "history.json" if item.entry else None
            if item.step.stage == stage and path and path.is_file():
                found[item.step.name] = json.loads(path.read_text())["steps"]
        return found

    def samples(self) -> list[dict[str, Any]]:
        """Prompts and greedy answers of the last checkpoint that was asked."""
        for item in reversed(self.evaluations.values()):
            path = item.entry.path / "evaluation.json" if item.entry else None
            samples = json.loads(path.read_text()).get("samples") if path and path.is_file() else None
            if samples:
                return [dict(sample) for sample in samples]
        return []


def _depth(catalog: Catalog, fingerprint: str) -> int:
    """Length of the longest way from material from outside to the artifact."""
    depths: dict[str, int] = {}

    def measure(name: str) -> int:
        if name not in depths:
            entry = catalog.by_fingerprint.get(name)
            inputs = entry.record.inputs.values() if entry else ()
            depths[name] = 1 + max((measure(item.fingerprint) for item in inputs), default=0)
        return depths[name]

    return measure(fingerprint)


def _position(checkpoints: list[str], subject: str) -> int:
    return checkpoints.index(subject) if subject in checkpoints else len(checkpoints)
