"""`Promotions`: which version of a model gets traffic, decided here and nowhere else, and written to the audit log.

A decision is one change of MLflow's aliases, which gateways follow. Everything slow or doubtful comes before it:
the candidate's files are checked and its figures are compared with the champion's. Then the aliases are changed, on the
condition that they are still what the decision was made on.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from moestro.artifacts import Artifact
from moestro.errors import BusyError, ConflictError, GateError, InputError, MoestroError
from moestro.registry import ModelChangedError, ModelRegistry, ModelVersion, RegisteredModel, Tracker
from moestro.registry.model_versions import CHALLENGER, CHAMPION, PREVIOUS
from moestro_flows.home import Home
from moestro_services.promotion_candidates import Candidate, check_whole, meant
from moestro_services.served import describe

ATTEMPTS = 5
"""How often a decision is made anew because somebody else's came first."""
FORCED_TAG = "moestro.forced"


class AuditLog(Protocol):
    """Where every call is written down."""

    def write(self, actor: str, action: str, target: str, **details: Any) -> None:
        """Keep an entry; `details` are JSON values."""


@dataclass(frozen=True)
class Promotion:
    """What a call did to a model, and what the model is now."""

    name: str
    version: str
    """The version that the call was about."""
    aliases: Mapping[str, str]
    """All aliases as they are now."""
    canary_share: float
    """What @challenger gets of the requests for the bare name."""
    forced: str = ""
    """The reason given for overriding refusals."""
    refused: tuple[str, ...] = ()
    """The refusals that were overridden, each with its figure and threshold."""
    changed: bool = True
    """False if everything was already so."""


class Promotions:
    """Decisions on the models of `home`. Each one, refused ones too, is written to `audit`; `changed` is called after
    one that changed something.

    All methods take the `actor`, whoever asked, and raise `ResourceError` if MLflow cannot be reached.
    """

    def __init__(self, home: Home, audit: AuditLog, *, changed: Callable[[], None] = lambda: None) -> None:
        self._home = home
        self._audit = audit
        self._changed = changed
        self._models = ModelRegistry(home.mlflow_uri, home.mlflow_files)

    def register(self, artifact: Artifact, *, actor: str) -> Promotion:
        """Make a version of `artifact`, a deployment in this home's store, under the name it has in itself.

        The first one becomes @champion, a later one @challenger (unless a canary holds that alias). One that was
        registered before changes nothing, whatever became of it since. Raises `ArtifactError` if the deployment or its
        checkpoint is missing or damaged.
        """
        with self._audited("register", f"{artifact.stage}/{artifact.fingerprint}", actor) as entry:
            name = describe(artifact).name
            entry["target"] = name
            check_whole(self._home.store, artifact.stage, artifact.fingerprint, what="this deployment")
            Tracker(self._home.mlflow_uri, self._home.mlflow_files).prepare()
            before = next((model for model in self._models.models() if model.name == name), None)
            version = self._models.introduce(name, artifact)
            forced = Candidate.of(self._home.store, version, served=True).deployment.get("forced", "")
            if forced and FORCED_TAG not in version.tags:
                self._models.change(name, aliases={}, tags={version.version: {FORCED_TAG: forced}})
            promotion = self._state(self._models.model(name), version, before, forced=forced)
            entry.update(_told(promotion, before), fingerprint=artifact.fingerprint)
        return self._tell(promotion)

    def promote(
        self, name: str, version: str = CHALLENGER, *, share: float | None = None, force: str = "", actor: str
    ) -> Promotion:
        """Give a version, by number or alias, all requests for the bare name, or `share` of them as a canary.

        All: it becomes @champion, the champion @previous; @challenger and a canary are ended. A share between 0 and 1:
        it becomes @challenger and answers that much. What is the champion already stays it, and nothing changes.

        Raises `GateError` with the figures if it is worse than the champion and `force` gives no reason to promote it
        all the same, `InputError` for a model, version or share that makes no sense, `ConflictError` for a share where
        there is no champion, `ArtifactError` if its deployment or checkpoint is missing or damaged, `BusyError` if
        others go on changing the model.
        """
        with self._audited("promote", name, actor, asked=version, share=share, force=force) as entry:
            if share is not None and not 0 < share < 1:
                raise InputError(
                    f"A canary's share lies between 0 and 1, not at {share:g}.", hint="Without one it gets everything."
                )
            model = self._models.model(name)
            wanted = meant(model, version)
            for _ in range(ATTEMPTS):
                entry.update({"version": wanted.version, "from": dict(model.aliases)})
                try:
                    promotion = self._promote(model, wanted, share, force.strip(), entry)
                    break
                except ModelChangedError:
                    model = self._models.model(name)
                    wanted = meant(model, wanted.version)  # the same version, wherever its alias went
            else:
                raise BusyError(f"{name} is being changed all the time.", hint="Try again.")
            entry.update(_told(promotion, model))
        return self._tell(promotion)

    def rollback(self, name: str, *, reason: str = "", actor: str, version: str = "") -> Promotion:
        """Take back what was promoted last: end a canary if there is one, else let @champion and @previous change
        places. Done again it goes forward again.

        With `version` only that version is rolled back: if it gets no traffic any more, nothing changes, so who
        watches a version cannot roll back what somebody else has put in its place. Raises `ConflictError` if there is
        nothing to go back to, `ArtifactError` if that is missing or damaged, `ModelChangedError` if somebody else
        changes the model meanwhile.
        """
        with self._audited("rollback", name, actor, reason=reason) as entry:
            model = self._models.model(name)
            entry["from"] = dict(model.aliases)
            promotion = self._rollback(model, version)
            entry.update(_told(promotion, model))
        return self._tell(promotion)

    def delete(self, name: str, version: str, *, actor: str) -> None:
        """Delete a version by number. Its deployment stays in the store; its number is not given again.

        Raises `BusyError` while an alias points to it, `InputError` if there is none.
        """
        with self._audited("delete", name, actor, version=version) as entry:
            found = meant(self._models.model(name), version)
            if found.version != version:
                raise InputError(f"@{version} is an alias of {name}@{found.version}.", hint="Name a version's number.")
            self._models.delete(name, version)
            entry.update(outcome="changed", fingerprint=found.fingerprint)
        self._changed()

    def _promote(
        self, model: RegisteredModel, wanted: ModelVersion, share: float | None, force: str, entry: dict[str, Any]
    ) -> Promotion:
        champion = model.aliased(CHAMPION)
        if champion and champion.version == wanted.version:
            return self._already_champion(model, wanted, share)
        if share is not None and champion is None:
            raise ConflictError(
                f"{model.name} has no champion to share requests with.", hint="Promote it to all of them."
            )
        refused = self._refusals(wanted, champion)
        entry["refused"] = refused
        if refused and not force:
            raise GateError(
                f"{model.name}@{wanted.version} is not promoted: {'; '.join(refused)}.",
                hint="Nothing was changed. `--force REASON` promotes it all the same, and is recorded.",
            )
        aliases: dict[str, str | None] = {CHALLENGER: wanted.version}
        if share is None:
            aliases = {CHAMPION: wanted.version, CHALLENGER: None}
            if champion:
                aliases[PREVIOUS] = champion.version
        tags = {wanted.version: {FORCED_TAG: force}} if force else {}
        after = self._models.change(model.name, aliases=aliases, canary_share=share or 0.0, tags=tags, seen=model)
        return self._state(after, wanted, model, forced=force, refused=tuple(refused))

    def _already_champion(self, model: RegisteredModel, wanted: ModelVersion, share: float | None) -> Promotion:
        """Nothing changes, but that a promotion that died before its last write is completed."""
        if share is None and model.aliases.get(CHALLENGER) == wanted.version:
            model = self._models.change(model.name, aliases={CHALLENGER: None}, canary_share=0.0, seen=model)
        return self._state(model, wanted, model)

    def _refusals(self, wanted: ModelVersion, champion: ModelVersion | None) -> list[str]:
        """Why `wanted` may not follow `champion`; its own files are looked at first."""
        from moestro.deployment.comparison import refusals

        candidate = Candidate.of(self._home.store, wanted)
        if champion is None:
            return []
        try:
            holder = Candidate.of(self._home.store, champion, served=True)
        except MoestroError as error:  # must not keep its successor away for good: with a reason it can be replaced
            return [f"the champion {champion.name}@{champion.version} cannot be compared with: {error.message}"]
        return refusals(candidate.deployment, holder.deployment, result=candidate.result, champion_result=holder.result)

    def _rollback(self, model: RegisteredModel, version: str) -> Promotion:
        champion, challenger = model.aliased(CHAMPION), model.aliased(CHALLENGER)
        canary = challenger if model.canary_share else None
        taken = canary or champion
        if version and version not in {item.version for item in (canary, champion) if item}:
            return self._state(model, meant(model, version), model)
        if taken is None:
            raise ConflictError(f"{model.name} has no champion.", hint="`moestro promote NAME@VERSION` makes one.")
        if canary and version != (champion.version if champion else None):
            after = self._models.change(model.name, aliases={CHALLENGER: None}, canary_share=0.0, seen=model)
            return self._state(after, canary, model)
        previous = model.aliased(PREVIOUS)
        if champion is None or previous is None or previous == champion:
            raise ConflictError(
                f"{model.name} has no version to go back to: nothing was promoted before @champion.",
                hint="`moestro promote NAME@VERSION` gives any version the traffic.",
            )
        check_whole(self._home.store, previous.stage, previous.fingerprint, what=f"{model.name}@{previous.version}")
        aliases = {CHAMPION: previous.version, PREVIOUS: champion.version}
        return self._state(self._models.change(model.name, aliases=aliases, seen=model), champion, model)

    @staticmethod
    def _state(
        model: RegisteredModel,
        version: ModelVersion,
        before: RegisteredModel | None,
        *,
        forced: str = "",
        refused: tuple[str, ...] = (),
    ) -> Promotion:
        changed = before is None or (model.aliases, model.canary_share, len(model.versions)) != (
            before.aliases,
            before.canary_share,
            len(before.versions),
        )
        return Promotion(model.name, version.version, model.aliases, model.canary_share, forced, refused, changed)

    def _tell(self, promotion: Promotion) -> Promotion:
        if promotion.changed:
            self._changed()
        return promotion

    @contextmanager
    def _audited(self, action: str, target: str, actor: str, **details: Any) -> Iterator[dict[str, Any]]:
        """Write an entry in the end, whatever happened. The block adds to it what it finds out."""
        entry: dict[str, Any] = {"outcome": "failed", **details}
        try:
            yield entry
        except MoestroError as error:
            entry.update(outcome="refused", error=type(error).__name__, message=error.message)
            raise
        finally:
            self._audit.write(actor, action, entry.pop("target", target), **entry)


def _told(promotion: Promotion, before: RegisteredModel | None) -> dict[str, Any]:
    """What of `promotion` goes into the audit log."""
    return {
        "outcome": "changed" if promotion.changed else "unchanged",
        "version": promotion.version,
        "from": dict(before.aliases) if before else {},
        "to": dict(promotion.aliases),
        "canary_share": promotion.canary_share,
    }
