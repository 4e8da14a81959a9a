"""What was made from what: a diagram of a run's artifacts, from left to right, as SVG in the page's own colours."""

from collections import defaultdict

from moestro_services.report.markup import Html, tag
from moestro_services.report.story import MEASUREMENTS, Story, Told

WIDTH, HEIGHT = 120, 34
GAP_X, GAP_Y = 28, 14
MARGIN = 6


def diagram(story: Story) -> Html:
    """The run's artifacts but for measurements; empty if none of them is in the store."""
    nodes = {item.step.fingerprint: item for item in story.steps if item.entry and item.step.stage not in MEASUREMENTS}
    if not nodes:
        return Html("")
    places = _places(nodes)
    edges = [
        _edge(places[item.fingerprint], places[fingerprint])
        for fingerprint, node in nodes.items()
        if node.entry
        for item in node.entry.record.inputs.values()
        if item.fingerprint in places
    ]
    boxes = [_box(node, *places[fingerprint]) for fingerprint, node in nodes.items()]
    width = max(x for x, _ in places.values()) + WIDTH + MARGIN
    height = max(y for _, y in places.values()) + HEIGHT + MARGIN
    drawing = tag(
        "svg", *edges, *boxes, viewBox=f"0 0 {width} {height}", width=str(width), height=str(height), role="img"
    )
    return tag("div", drawing, class_="wide lineage")


def _places(nodes: dict[str, Told]) -> dict[str, tuple[int, int]]:
    """Upper left corner of every node: a column further right than all of its inputs."""
    columns: dict[str, int] = {}
    for fingerprint, node in nodes.items():  # in the order in which inputs were made
        inputs = node.entry.record.inputs.values() if node.entry else ()
        columns[fingerprint] = 1 + max((columns.get(item.fingerprint, -1) for item in inputs), default=-1)
    members: dict[int, list[str]] = defaultdict(list)
    for fingerprint, column in columns.items():
        members[column].append(fingerprint)
    tallest = max(len(group) for group in members.values())
    places = {}
    for column, group in members.items():
        top = (tallest - len(group)) * (HEIGHT + GAP_Y) // 2
        for row, fingerprint in enumerate(group):
            x = MARGIN + column * (WIDTH + GAP_X)
            places[fingerprint] = (x, MARGIN + top + row * (HEIGHT + GAP_Y))
    return places


def _edge(start: tuple[int, int], end: tuple[int, int]) -> Html:
    x1, y1 = start[0] + WIDTH, start[1] + HEIGHT // 2
    x2, y2 = end[0], end[1] + HEIGHT // 2
    bend = GAP_X // 2
    return tag("path", d=f"M{x1} {y1} C{x1 + bend} {y1} {x2 - bend} {y2} {x2} {y2}", class_="edge")


def _box(node: Told, x: int, y: int) -> Html:
    fingerprint = node.step.fingerprint
    label = tag("text", node.step.name, x=str(x + 9), y=str(y + 15), class_="name")
    digits = tag("text", fingerprint[:16], x=str(x + 9), y=str(y + 28), class_="digits")
    box = tag("rect", x=str(x), y=str(y), width=str(WIDTH), height=str(HEIGHT), rx="6")
    return tag("g", tag("title", f"{node.step.stage} {fingerprint}"), box, label, digits)
