"""In which order a model's aliases are written, and how the canary's share is. MLflow has no transactions."""

import math
from collections.abc import Mapping

from moestro.errors import InputError
from moestro.registry.model_versions import CHAMPION


def ordered(now: Mapping[str, str], wanted: Mapping[str, str | None]) -> list[tuple[str, str | None]]:
    """The writes that turn the aliases `now` into `wanted` (None deletes one), in the order to make them in.

    A process may die between any two writes. What it leaves can be served, and nothing is lost by it, because

    1. every alias points to an existing version all the time, and @champion, once there, is never away: it moves in one
       write;
    2. a version that has an alias now and is to have one afterwards has one in between, so its server is not ended
       and started again, and whoever repeats the command finds it by name;
    3. among the writes that this allows, those that give no traffic come first, then @champion, deletions last.

    A promotion is therefore: @previous to the old champion, @challenger's version to @champion, @challenger deleted.
    Died after the first, the champion is its own predecessor; after the second, its own challenger: both answer as one.

    A rollback swaps two versions, where 2. cannot hold for both. There @champion goes first: traffic is right at
    once, and what may be nameless for a moment, or if the process dies then, is the version that was just dismissed.
    """
    state = dict(now)
    left = {alias: target for alias, target in wanted.items() if state.get(alias) != target}
    kept = {target for target in {**now, **wanted}.values() if target is not None}
    writes: list[tuple[str, str | None]] = []
    while left:
        by_weight = sorted(left, key=lambda alias: (left[alias] is None, alias == CHAMPION, alias))
        harmless = [alias for alias in by_weight if not _only_name(state, alias, kept)]
        alias = harmless[0] if harmless else max(left, key=lambda item: (item == CHAMPION, item))
        target = left.pop(alias)
        writes.append((alias, target))
        if target is None:
            del state[alias]
        else:
            state[alias] = target
    return writes


def _only_name(state: Mapping[str, str], alias: str, kept: set[str]) -> bool:
    """Whether `alias` is the one name of a version that is to keep one."""
    version = state.get(alias)
    return version in kept and list(state.values()).count(version) == 1


def share_tag(challenger: str | None, share: float) -> str:
    """How the tag says that version `challenger` gets `share` of the requests; raises `InputError` outside 0 to 1."""
    if not 0 <= share < 1:
        raise InputError(f"A canary's share is a number between 0 and 1, not {share:g}.")
    if not share:
        return ""
    if challenger is None:
        raise InputError("A share needs a @challenger to get it.")
    return f"{challenger}:{share!r}"


def share_of(tag: str, challenger: str | None) -> float:
    """The share that version `challenger` gets; 0 if the tag means another one, or says nothing."""
    version, _, text = tag.partition(":")
    try:
        share = float(text)
    except ValueError:
        return 0.0
    return share if version == challenger and math.isfinite(share) and 0 < share < 1 else 0.0
