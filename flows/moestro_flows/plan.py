"""`plan`: which steps of a lifecycle would run and which are reused, and which field is to blame. Runs nothing.

A run checks every byte of what it reuses; a plan looks at the files' sizes alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moestro.artifacts import ArtifactStore, Input, Record, verify
from moestro.config import Config, LifecycleConfig
from moestro.errors import ArtifactError
from moestro.execution import Step
from moestro.stages import STAGES
from moestro_flows.lifecycle import walk
from moestro_flows.outline import outline

Action = Literal["reuse", "run", "damaged"]


@dataclass(frozen=True)
class PlannedStep:
    """One step; stands for its artifact as an input of others."""

    name: str
    stage: str
    fingerprint: str
    action: Action
    """`damaged`: its artifact is there and not what was published, which stops a run."""
    reason: str
    work: str = ""
    """What it trains, in a few words; empty for a step that does not."""


@dataclass
class Plan:
    """The planned steps in the order of the walk. `run` is handed to `walk`."""

    store: ArtifactStore
    steps: list[PlannedStep] = field(default_factory=list)

    @classmethod
    def of(cls, config: LifecycleConfig, store: ArtifactStore) -> "Plan":
        """The plan of `config` against what `store` holds."""
        plan = cls(store)
        walk(config, plan.run)
        return plan

    def run(self, name: str, stage: str, config: Config, **inputs: Any) -> PlannedStep:
        """Plan one step."""
        step = Step(stage, config, inputs)
        roles = step.roles()
        identity = step.identity(roles)
        action, reason = self._action(step, roles, self.store.folder(stage, identity))
        planned = PlannedStep(name, stage, identity, action, reason, outline(config))
        self.steps.append(planned)
        return planned

    def _action(self, step: Step, roles: dict[str, Input], folder: Path) -> tuple[Action, str]:
        if not folder.exists():
            return "run", self._why(step, roles)
        damage = _damage(folder)
        return ("damaged", damage) if damage else ("reuse", "")

    def _why(self, step: Step, roles: dict[str, Input]) -> str:
        """What differs from the most similar artifact there is of this step."""
        changed = {planned.fingerprint: planned.name for planned in self.steps if planned.action == "run"}
        upstream = sorted({changed[item.fingerprint] for item in roles.values() if item.fingerprint in changed})
        differences = [list(_differences(step, roles, record)) for record in _records(self.store, step)]
        if not differences:
            return "never run" + (f"; waits for {', '.join(upstream)}" if upstream else "")
        nearest = min(reversed(differences), key=len)
        fields = [item for item in nearest if not item.startswith("input ")]
        sources = [item for item in nearest if item.startswith("input source/")]
        reasons = fields + [f"{item.removeprefix('input ')} has other contents" for item in sources]
        if upstream:
            reasons.append(f"{', '.join(upstream)} will run")
        return "; ".join(reasons) or "its inputs are others"


def _damage(folder: Path) -> str:
    """What is wrong with a published artifact, as far as its record and the sizes of its files tell."""
    try:
        verify(folder, Record.read(folder), contents=False)
    except ArtifactError as error:
        return str(error)
    return ""


def _records(store: ArtifactStore, step: Step) -> Iterator[Record]:
    """Records of the same stage, and of the same domain where there is one per domain; unreadable ones are skipped."""
    domain = _domain(step.config.identity())
    for path in sorted(store.root.glob(f"artifacts/{step.stage}/*/artifact.json")):
        try:
            record = Record.read(path.parent)
        except ArtifactError:
            continue
        if _domain(record.config) == domain:
            yield record


def _domain(config: dict[str, Any]) -> Any:
    domain = config.get("domain")
    return domain.get("name") if isinstance(domain, dict) else domain


def _differences(step: Step, roles: dict[str, Input], record: Record) -> Iterator[str]:
    if record.version != STAGES[step.stage].version:
        yield f"the stage's version: {record.version} -> {STAGES[step.stage].version}"
    wanted, found = flat(step.config.identity()), flat(type_identity(step.config, record.config))
    for key in sorted(wanted.keys() | found.keys()):
        if wanted.get(key) != found.get(key):
            yield f"{key}: {found.get(key)!r} -> {wanted.get(key)!r}"
    for role in sorted(roles.keys() | record.inputs.keys()):
        if roles.get(role) != record.inputs.get(role):
            yield f"input {role}"


def type_identity(config: Config, recorded: dict[str, Any]) -> dict[str, Any]:
    """The recorded config's fields that bear identity: those `config`'s own identity has, and unknown ones."""
    full, identity = config.model_dump(mode="json"), config.identity()
    return _without(recorded, full, identity)


def _without(recorded: dict[str, Any], full: dict[str, Any], identity: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in recorded.items():
        if key in full and key not in identity:
            continue
        nested = isinstance(value, dict) and isinstance(full.get(key), dict) and isinstance(identity.get(key), dict)
        kept[key] = _without(value, full[key], identity[key]) if nested else value
    return kept


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one mapping of dotted names."""
    if isinstance(value, dict):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        items = [(str(position), item) for position, item in enumerate(value)]
    else:
        return {prefix: value}
    result: dict[str, Any] = {}
    for key, item in items:
        result.update(flat(item, f"{prefix}.{key}" if prefix else key))
    return result
