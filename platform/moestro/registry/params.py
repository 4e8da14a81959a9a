"""What MLflow accepts: flat params, names of few characters, values of limited length."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

MAX_VALUE = 6000
MAX_NAME = 250


def flatten_params(params: Mapping[str, Any]) -> dict[str, str]:
    """Nested values by dotted name, as text no longer than MLflow keeps; lists of plain values stay together."""
    return {entity_name(key): _shorten(value) for key, value in _leaves(params, "")}


def _leaves(value: Any, key: str) -> Iterator[tuple[str, str]]:
    plain = not isinstance(value, Mapping | list | tuple)
    if isinstance(value, list | tuple) and not any(isinstance(item, Mapping | list | tuple) for item in value):
        yield key, json.dumps(list(value))
    elif plain:
        yield key, value if isinstance(value, str) else json.dumps(value)
    else:
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, item in items:
            yield from _leaves(item, f"{key}.{name}" if key else str(name))


def _shorten(value: str) -> str:
    return value if len(value) <= MAX_VALUE else value[: MAX_VALUE - 1] + "…"


def entity_name(name: str) -> str:
    """`name` with what MLflow refuses in the name of a metric or param replaced by `_`."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)[:MAX_NAME]
