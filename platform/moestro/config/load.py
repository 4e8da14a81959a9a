"""Reading configs from YAML, with errors that name the field, the value and the nearest valid name."""

import difflib
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from moestro.config.lifecycle import LifecycleConfig
from moestro.errors import ConfigError

T = TypeVar("T")


def read_yaml(path: Path) -> Any:
    """The parsed YAML document at `path`; raises `ConfigError` naming the line of a syntax error."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file.") from None
    except (IsADirectoryError, UnicodeDecodeError, PermissionError) as error:
        raise ConfigError(f"{path}: not a readable YAML file ({error}).") from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None


def load_lifecycle(path: Path) -> LifecycleConfig:
    """The lifecycle config at `path`."""
    return validate(LifecycleConfig, read_yaml(path), where=str(path))


def validate(kind: type[T], data: Any, *, where: str) -> T:
    """`data` as `kind` (a config class or a union of them); raises one `ConfigError` listing every mistake."""
    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        lines = [_explain(kind, data, dict(item)) for item in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(lines)) from None


def _explain(kind: Any, data: Any, item: dict[str, Any]) -> str:
    location = ".".join(str(part) for part in _without_tags(data, item["loc"])) or "(top level)"
    if item["type"] == "extra_forbidden":
        name = str(item["loc"][-1])
        near = difflib.get_close_matches(name, sorted(_field_names(kind)), n=1, cutoff=0.6)
        return f"{location}: unknown field" + (f", did you mean {near[0]!r}?" if near else "")
    if item["type"] == "missing":
        return f"{location}: required field is missing"
    given = item.get("input")
    shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool) else ""
    return f"{location}: {item['msg'].removeprefix('Value error, ')}{shown}"


def _without_tags(data: Any, location: tuple[Any, ...]) -> list[Any]:
    """`location` without the union tags that pydantic inserts, which stand nowhere in the user's file."""
    path: list[Any] = []
    for position, part in enumerate(location):
        last = position == len(location) - 1
        in_mapping = isinstance(data, dict) and part in data
        in_sequence = isinstance(data, list | tuple) and isinstance(part, int) and part < len(data)
        if in_mapping or in_sequence:
            data = data[part]
        elif not last or (isinstance(data, dict) and data.get("type") == part):
            continue
        path.append(part)
    return path


def _field_names(kind: Any, seen: set[Any] | None = None) -> set[str]:
    """All field names in `kind` and the configs it holds."""
    seen = set() if seen is None else seen
    names: set[str] = set()
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        if kind in seen:
            return names
        seen.add(kind)
        for name, field in kind.model_fields.items():
            names.add(name)
            names |= _field_names(field.annotation, seen)
    for argument in getattr(kind, "__args__", ()):
        names |= _field_names(argument, seen)
    return names
