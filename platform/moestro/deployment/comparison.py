"""A candidate against the champion: what its deployment's figures say, with the candidate's thresholds.

Figures are compared only if they were measured on the same thing: losses on the same token ids, accuracy on the same
problems, times and memory on the same kind of machine, times with the same requests. Whatever the champion has a
figure of and the candidate has none to compare with is refused in words, not passed over. What the candidate alone
was measured on (a new domain, a new task) has nothing to fall behind; its absolute bounds stand. A bound of None
leaves its comparison out.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moestro.deployment.paired import CONFIDENCE, smallest_drop

Json = Mapping[str, Any]
GIB = 1024**3
REQUESTS = ("concurrency", "prompt_tokens", "output_tokens")
"""What times depend on, of the latency gate's config."""


@dataclass(frozen=True)
class _Side:
    """One deployment: `deployment.json`, parsed, and its record's result."""

    deployment: Json
    result: Json

    def gate(self, name: str, part: str) -> Json:
        """A part of a gate's entry; empty where there is none."""
        return _mapping(_mapping(_mapping(self.deployment.get("gates")).get(name)).get(part))


def refusals(candidate: Json, champion: Json, *, result: Json, champion_result: Json) -> list[str]:
    """Why `candidate` may not take the place of `champion`, each in words with figure and threshold; empty if it may.

    `candidate` and `champion` are parsed `deployment.json` files, `result` and `champion_result` what their records
    hold as `result`. Whatever these lack is told as not comparable; nothing is raised.
    """
    new, old = _Side(candidate, result), _Side(champion, champion_result)
    found: list[str] = []
    for gate, threshold, compared in COMPARISONS:
        thresholds = new.gate(gate, "thresholds")
        bound = _number(thresholds.get(threshold))
        if bound is not None:
            found += compared(new, old, bound)
        elif thresholds.get(threshold, math.nan) is not None:
            found.append(f"{gate} is not comparable: the candidate was deployed without the threshold {threshold}")
    return found


def _losses(new: _Side, old: _Side, bound: float) -> Iterator[str]:
    losses = _mapping(old.gate("quality", "figures").get("held_out_loss"))
    if not losses:
        yield "held-out loss is not comparable: the champion has no figures of it"
    for domain in losses:
        before, after = _loss(old, domain), _loss(new, domain)
        texts = [_mapping(side.gate("quality", "evidence").get("text")).get(domain) for side in (old, new)]
        what = f"the held-out loss of {domain}"
        if before is None or after is None:
            yield f"{what} is not comparable: {'the champion' if before is None else 'the candidate'} has no figure"
        elif texts[0] is None or texts[0] != texts[1]:
            yield f"{what} is not comparable: it was measured on other text than the champion's"
        elif not after - before <= bound:
            yield (
                f"{what} rose by {after - before:.4g} nats per token from the champion's {before:.4g} to {after:.4g} "
                f"(at most {bound:g} is allowed)"
            )


def _loss(side: _Side, domain: str) -> float | None:
    return _number(_mapping(side.gate("quality", "figures").get("held_out_loss")).get(domain))


def _accuracy(new: _Side, old: _Side, bound: float) -> Iterator[str]:
    before, after = (_mapping(side.gate("quality", "evidence").get("task")) for side in (old, new))
    if not before:
        return
    what = f"accuracy at {before.get('name')}"
    if not after:
        yield f"{what} is not comparable: the candidate was measured on no task"
        return
    if before.get("problems") is None or before.get("problems") != after.get("problems"):
        yield f"{what} is not comparable: the candidate answered other problems than the champion"
        return
    answers = [str(side.get("right", "")) for side in (before, after)]
    if not answers[0] or len(answers[0]) != len(answers[1]):
        yield f"{what} is not comparable: not all answers are recorded"
        return
    drop = smallest_drop(*answers)
    if not drop <= bound:
        shares = [side.count("1") / len(side) for side in answers]
        yield (
            f"{what} fell from the champion's {shares[0]:.3g} to {shares[1]:.3g} over {len(answers[0])} problems, by "
            f"at least {drop:.3g} at {CONFIDENCE:.0%} confidence (at most {bound:g} is allowed)"
        )


def _latency(new: _Side, old: _Side, bound: float) -> Iterator[str]:
    requests = [[side.gate("latency", "thresholds").get(name) for name in REQUESTS] for side in (new, old)]
    figures = {
        "first_token_seconds": "the median time to the first token",
        "per_token_seconds": "the median time of each later token",
    }
    if reason := _other_machine(new, old):
        yield f"latency is not comparable: {reason}"
    elif None in requests[0] or requests[0] != requests[1]:
        yield "latency is not comparable: the champion was asked with other prompts and answers, or as many at a time"
    else:
        for name, what in figures.items():
            negligible = _number(new.gate("latency", "thresholds").get(f"negligible_{name}")) or 0.0
            times = (new.result.get(name), old.result.get(name))
            yield from _ratio(what, times, bound, negligible=negligible, unit="s")


def _memory(new: _Side, old: _Side, bound: float) -> Iterator[str]:
    weights = [_gib(side.gate("memory", "figures").get("weights_bytes")) for side in (new, old)]
    yield from _ratio("the size of the weights", weights, bound, unit="GiB")
    if reason := _other_machine(new, old):
        yield f"the peak of resident memory is not comparable: {reason}"
    else:
        peaks = [_gib(side.result.get("peak_memory_bytes")) for side in (new, old)]
        yield from _ratio("the peak of resident memory", peaks, bound, unit="GiB")


COMPARISONS: tuple[tuple[str, str, Callable[[_Side, _Side, float], Iterator[str]]], ...] = (
    ("quality", "max_loss_increase", _losses),
    ("quality", "max_accuracy_drop", _accuracy),
    ("latency", "max_ratio", _latency),
    ("memory", "max_ratio", _memory),
)
"""By gate and its threshold, what compares with it."""


def _other_machine(new: _Side, old: _Side) -> str:
    """Why figures of the machine cannot be compared; empty if they can."""
    ours, theirs = new.result.get("machine"), old.result.get("machine")
    if not ours or not theirs:
        return f"the {'candidate' if not ours else 'champion'}'s record names no machine"
    return "" if ours == theirs else f"it was measured on {ours}, the champion's on {theirs}"


def _ratio(what: str, pair: Sequence[Any], bound: float, *, unit: str, negligible: float = 0.0) -> Iterator[str]:
    """The refusal of the first of two figures if it is more than `bound` times the second, the champion's, and they
    differ by more than `negligible`."""
    now, then = map(_number, pair)
    if now is None or then is None:
        yield f"{what} is not comparable: {'the candidate' if now is None else 'the champion'} has no figure"
    elif now > bound * then and now - then > negligible:
        times = f"{now / then:.3g} times the champion's" if then > 0 else "above the champion's"
        yield f"{what} is {times}: {now:.3g} {unit} against {then:.3g} {unit} (at most {bound:g} times is allowed)"


def _gib(value: Any) -> float | None:
    number = _number(value)
    return None if number is None else number / GIB


def _number(value: Any) -> float | None:
    """A finite number; None for anything else."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def _mapping(value: Any) -> Json:
    return value if isinstance(value, Mapping) else {}
