"""How commands print: tables for people, with `--json` one JSON document and nothing else on standard output."""

import json as json_format
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import BaseModel
from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table

WIDTH = 140
"""Columns of what is printed into a file or a pipe."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]


OUT, ERR = 1, 2
"""Standard output and standard error as file descriptors."""


@contextmanager
def others_on_stderr() -> Iterator[None]:
    """Whatever is printed in the block goes to standard error, by libraries and child processes too: Ray's driver tells
    of failed calls on standard output, which is the result's alone."""
    own = sys.stdout
    own.flush()
    kept = os.dup(OUT)
    os.dup2(ERR, OUT)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        own.flush()
        os.dup2(kept, OUT)
        os.close(kept)


def own_command() -> str:
    """`moestro` as it can be typed: by the path it was called by where it is not on PATH."""
    called = Path(sys.argv[0])
    return "moestro" if called.name != "moestro" or shutil.which("moestro") else str(called)


def emit(data: Any, render: Callable[[], RenderableType], *, json: bool) -> None:
    """Print `data` as JSON, or else what `render` makes of it."""
    if json:
        sys.stdout.write(json_format.dumps(_plain(data), indent=2, ensure_ascii=False) + "\n")
    else:
        made = render()
        terminal = Console()
        (terminal if terminal.is_terminal else Console(width=WIDTH)).print(made)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, datetime):
        return value.isoformat()
    return value


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str = "") -> Table:
    """A table; a column whose name starts with `>` is aligned to the right, one with `=` is never broken."""
    made = Table(
        title=title,
        title_justify="left",
        caption=caption or None,
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for name in columns:
        side: Literal["left", "right"] = "right" if name.startswith(">") else "left"
        made.add_column(name.lstrip(">="), justify=side, overflow="fold", no_wrap=name[:1] in {">", "="})
    for row in rows:
        made.add_row(*(escape(cell) for cell in row))
    return made


def duration(seconds: float) -> str:
    """`3.2 s`, `4 min 05 s`, `2 h 07 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float) -> str:
    """Bytes in decimal units: `12.3 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def figure(value: Any) -> str:
    """A key figure for a table's cell."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {figure(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(figure(item) for item in value)
    return "-" if value is None else str(value)


def moment(when: datetime) -> str:
    """A point in time in the reader's own zone, to the minute."""
    return when.astimezone().strftime("%Y-%m-%d %H:%M")
