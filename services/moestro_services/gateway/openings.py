"""Fields of a lifecycle config that reach files or code outside the home. Requests may change none of them.

`changed` puts values into a config that the operator wrote; whatever in the result is a path, a Python function or an
argument that a task's generator may take for a file's name must stand in the operator's config already.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

from moestro.config import Config, LifecycleConfig, TaskConfig, validate
from moestro.errors import ConfigError

OPEN_FIELDS = frozenset({"pairs", "path", "paths"})
"""Names of the fields that name files or code, whatever config they stand in."""
FIELD_PATTERN = r"^[a-z][a-z0-9_]{0,63}(\.[a-z0-9][a-z0-9_-]{0,63}){0,9}$"
"""A field by its dotted path: names of fields and domains, positions in lists."""

Opening = tuple[str, str, str]
"""Config class, field, value."""


def openings(config: Config) -> frozenset[Opening]:
    """All paths, functions and words for generators in `config`."""
    return frozenset(_openings(config))


def _openings(value: Any) -> Iterator[Opening]:
    if isinstance(value, Config):
        kind = type(value).__name__
        for name in type(value).model_fields:
            held = getattr(value, name)
            if name in OPEN_FIELDS:
                yield from ((kind, name, str(item)) for item in ([held] if isinstance(held, str) else held or ()))
            else:
                yield from _openings(held)
        if isinstance(value, TaskConfig):
            words = {name: word for name, word in value.arguments.items() if isinstance(word, str)}
            yield from ((value.name, name, word) for name, word in words.items())
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _openings(item)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from _openings(item)


def changed(config: LifecycleConfig, changes: Mapping[str, Any], *, name: str) -> LifecycleConfig:
    """`config` with the field at each dotted path set; `name` says in errors which config it is.

    Raises `ConfigError` for a field that is not there, a config that does not hold together, or a change by which the
    lifecycle would read a file or run code that the config as it stands does not name.
    """
    if not changes:
        return config
    data = config.model_dump(mode="json")
    for field, value in changes.items():
        _set(data, field, deepcopy(value), name)
    made = validate(LifecycleConfig, data, where=name)
    if added := sorted(openings(made) - openings(config)):
        kind, field, _ = added[0]
        raise ConfigError(
            f"{name}: {field} of {kind} names files, code or words for a generator, and may not be set by a request.",
            hint="Put a config that holds it into the home's folder configs.",
        )
    return made


def _set(data: dict[str, Any], field: str, value: Any, name: str) -> None:
    if not re.fullmatch(FIELD_PATTERN, field):
        raise ConfigError(f"{name}: {field!r} is no dotted path of a field.", hint="Such as `tune.training.steps`.")
    *parents, last = field.split(".")
    place: Any = data
    for part in parents:
        place = _inner(place, part)
    if isinstance(place, list) and last.isdecimal() and int(last) < len(place):
        place[int(last)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise ConfigError(f"{name}: {field}: there is no such field, or what it stands in is not set.")


def _inner(place: Any, part: str) -> Any:
    if isinstance(place, list) and part.isdecimal() and int(part) < len(place):
        return place[int(part)]
    return place.get(part) if isinstance(place, dict) else None
