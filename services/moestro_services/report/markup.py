"""Small pieces of HTML. Every function escapes the text it is given; `Html` marks what is markup already."""

from collections.abc import Iterable, Sequence
from html import escape


class Html(str):
    """Markup."""

    __slots__ = ()


def html(value: object) -> Html:
    """`value` as markup: itself if it is, else its escaped text."""
    return value if isinstance(value, Html) else Html(escape(str(value)))


def tag(name: str, *contents: object, **attributes: str) -> Html:
    """An element; `class_` becomes `class`, underscores become dashes."""
    pairs = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{pairs}>{''.join(html(item) for item in contents)}</{name}>")


def join(parts: Iterable[object]) -> Html:
    """Parts one after another."""
    return Html("\n".join(html(part) for part in parts))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Html:
    """A table that scrolls by itself when it is wide; columns whose name starts with `>` hold numbers."""
    kinds = ["number" if name.startswith(">") else "text" for name in columns]
    head = [
        tag("th", name.removeprefix(">"), class_=kind, scope="col") for name, kind in zip(columns, kinds, strict=True)
    ]
    body = [tag("tr", *(tag("td", cell, class_=kind) for cell, kind in zip(row, kinds, strict=True))) for row in rows]
    return tag("div", tag("table", tag("thead", tag("tr", *head)), tag("tbody", *body)), class_="wide")


def section(title: str, *contents: object, note: str = "") -> Html:
    """A titled part of the page; empty if it has no contents."""
    kept = [item for item in contents if str(item)]
    if not kept:
        return Html("")
    remark = tag("p", note, class_="note") if note else ""
    return tag("section", tag("h2", title), remark, *kept)


def folded(summary: str, *contents: object) -> Html:
    """Contents that open on a click, and are printed in any case."""
    return tag("details", tag("summary", summary), *contents)
