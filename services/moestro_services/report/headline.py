"""The figures at the top of the page: what the lifecycle achieved, each against where it began."""

from collections.abc import Iterator

from moestro_services.cli.output import size
from moestro_services.report.markup import Html, tag
from moestro_services.report.story import Story

Tile = tuple[str, str, str]


def headline(story: Story) -> Html:
    """A tile per figure that the run has."""
    tiles = [*_quality(story), *_reward(story), *_experts(story), *_size(story)]
    made = [
        tag("div", tag("p", name, class_="what"), tag("p", value, class_="value"), tag("p", remark, class_="note"))
        for name, value, remark in tiles
    ]
    return tag("div", *made, class_="tiles") if made else Html("")


def _quality(story: Story) -> Iterator[Tile]:
    if not story.evaluations:
        return
    measured = list(story.evaluations.items())
    (start, first), (end, last) = measured[0], measured[-1]
    before, after = first.result["geometric_mean_perplexity"], last.result["geometric_mean_perplexity"]
    yield "Held-out perplexity", f"{after:.2f}", f"{end}; {start} {before:.2f}"
    was, now = first.result.get("task_accuracy"), last.result.get("task_accuracy")
    if now is not None:
        yield "Task accuracy", f"{now:.1%}", end + ("" if was is None else f"; {start} {was:.1%}")


def _reward(story: Story) -> Iterator[Tile]:
    rl = story.named("rl")
    if rl and "reward_last" in rl.result:
        yield "RL reward", f"{rl.result['reward_last']:.2f}", f"from {rl.result['reward_first']:.2f}"


def _experts(story: Story) -> Iterator[Tile]:
    if not story.profiles:
        return
    end, last = list(story.profiles.items())[-1]
    own = {name: value for name, value in last.result.get("specialisation", {}).items() if value is not None}
    if own:
        best = max(own, key=lambda name: own[name])
        yield "Strongest specialist", f"{own[best]:.2f}×", f"{best}'s own expert against an even share; {end}"


def _size(story: Story) -> Iterator[Tile]:
    compress = story.named("compress")
    if compress is None:
        return
    before, after = compress.result.get("before", {}), compress.result.get("after", {})
    if "size_bytes" in before and "size_bytes" in after:
        yield "Size on disk", size(after["size_bytes"]), f"{size(before['size_bytes'])} before pruning experts"
