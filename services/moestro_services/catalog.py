"""`Catalog`: runs, artifacts and their lineage as the records of a home tell them, found by what a user types.

A run is meant by its id, the beginning of it, its lifecycle's name or `latest`; an artifact by its folder, the
beginning of its fingerprint, `stage/beginning`, or its stage's name (the newest).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydantic import Field

from moestro.artifacts import RECORD_NAME, Artifact, LifecycleRun, Record, read_runs
from moestro.config import Config
from moestro.errors import ArtifactError, InputError
from moestro.stages import STAGES
from moestro_flows.home import Home

DIGITS = 16
MIN_PREFIX = 4


class Ancestor(Config):
    """One artifact in a lineage, with what it was made from."""

    stage: str
    """The stage that made it; `files` for material from outside the store."""
    fingerprint: str
    """Its identity."""
    inputs: dict[str, str] = Field(default_factory=dict)
    """Fingerprints of what it was made from, by role."""
    present: bool = True
    """Whether its record is in the store."""


@dataclass(frozen=True)
class Entry:
    """A published artifact: where it lies and its record."""

    path: Path
    record: Record

    @property
    def artifact(self) -> Artifact:
        """The artifact itself."""
        return Artifact(self.path, self.record.stage, self.record.fingerprint)


class Catalog:
    """What the records of `home` say at the time of asking; records are read once."""

    def __init__(self, home: Home) -> None:
        self.home = home

    @cached_property
    def runs(self) -> list[LifecycleRun]:
        """All runs, newest first; raises `ArtifactError` for a record that cannot be read."""
        return sorted(read_runs(self.home.runs), key=lambda run: run.id, reverse=True)

    @cached_property
    def entries(self) -> list[Entry]:
        """All published artifacts, newest first."""
        return [Entry(path, record) for path, record in self.home.store.records()][::-1]

    @cached_property
    def by_fingerprint(self) -> dict[str, Entry]:
        """All published artifacts by their identity."""
        return {entry.record.fingerprint: entry for entry in self.entries}

    def run(self, reference: str = "latest") -> LifecycleRun:
        """The run that `reference` means; raises `InputError` if there is none or more than one."""
        if not self.runs:
            raise InputError(f"{self.home.path} holds no runs.", hint="`moestro run CONFIG.yaml` makes one.")
        if reference == "latest":
            return self.runs[0]
        named = [run for run in self.runs if run.name == reference]
        if named:
            return named[0]
        found = [run for run in self.runs if run.id.startswith(reference)]
        if len(found) > 1 and reference not in {run.id for run in found}:
            raise InputError(f"{len(found)} runs begin with {reference!r}.", hint="Give more of the id.")
        if not found:
            raise InputError(f"No run {reference!r} in {self.home.path}.", hint="`moestro show` lists the runs.")
        return found[0]

    def entry(self, reference: str) -> Entry:
        """The artifact that `reference` means; raises `ArtifactError` if there is none, `InputError` if several."""
        folder = Path(reference)
        if (folder / RECORD_NAME).is_file():
            return Entry(folder.absolute(), Record.read(folder))
        return self.published(reference)

    def published(self, reference: str) -> Entry:
        """Like `entry`, of this home's artifacts alone: `reference` is never a folder."""
        reference = reference.rpartition("/")[2]
        if reference in STAGES:
            found = [entry for entry in self.entries if entry.record.stage == reference][:1]
        else:
            found = self._beginning_with(reference)
        if len(found) > 1:
            shown = ", ".join(f"{entry.record.stage} {entry.record.fingerprint[:DIGITS]}" for entry in found[:4])
            raise InputError(f"{reference!r} begins several fingerprints: {shown}.", hint="Give more digits.")
        if not found:
            raise ArtifactError(
                f"No artifact {reference!r} in {self.home.path}.", hint="`moestro show artifacts` lists what there is."
            )
        return found[0]

    def _beginning_with(self, reference: str) -> list[Entry]:
        if len(reference) < MIN_PREFIX:
            return []
        return [entry for entry in self.entries if entry.record.fingerprint.startswith(reference)]

    def lineage(self, record: Record) -> list[Ancestor]:
        """`record` and everything it was made from, each once, a thing before what it was made from."""
        return list(self._ancestors(record.stage, record.fingerprint, set()))

    def _ancestors(self, stage: str, fingerprint: str, seen: set[str]) -> Iterator[Ancestor]:
        if fingerprint in seen:
            return
        seen.add(fingerprint)
        entry = self.by_fingerprint.get(fingerprint)
        inputs = entry.record.inputs if entry else {}
        yield Ancestor(
            stage=stage,
            fingerprint=fingerprint,
            inputs={role: item.fingerprint for role, item in inputs.items()},
            present=entry is not None,
        )
        for item in inputs.values():
            yield from self._ancestors(item.stage, item.fingerprint, seen)

    def made_from(self, fingerprint: str) -> list[Entry]:
        """The artifacts that have it as an input, newest first."""
        return [
            entry
            for entry in self.entries
            if any(item.fingerprint == fingerprint for item in entry.record.inputs.values())
        ]

    def measurement(self, stage: str, fingerprint: str) -> Entry | None:
        """The newest `evaluate` or `profile` artifact of a checkpoint."""
        for entry in self.entries:
            model = entry.record.inputs.get("model")
            if entry.record.stage == stage and model and model.fingerprint == fingerprint:
                return entry
        return None

    def profile_of(self, entry: Entry) -> Entry:
        """The profile of a checkpoint (a profile or a deployment will do as well).

        Raises `ArtifactError` if it was never profiled.
        """
        if entry.record.stage == "profile":
            return entry
        fingerprint = entry.record.fingerprint
        if entry.record.stage == "deploy":
            fingerprint = entry.record.inputs["model"].fingerprint
        found = self.measurement("profile", fingerprint)
        if found is None:
            raise ArtifactError(
                f"{entry.record.stage} {entry.record.fingerprint[:DIGITS]} has no profile.",
                hint="What mix, tune, rl and compress make is profiled by `moestro run`; dense models have no experts.",
            )
        return found
