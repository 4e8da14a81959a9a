"""Reading configs from YAML, with errors that name the field, the value and the nearest valid name."""

import difflib
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from moestro.config.lifecycle import LifecycleConfig
from moestro.errors import ConfigError

T = TypeVar("T")
LISTED_FIELDS = 5
"""Up to how many fields an error lists where none is like the one given."""


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, but a key that stands twice in one mapping is an error, not silently the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain word", key.start_mark)
            if key.tag != "tag:yaml.org,2002:merge" and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: Path) -> Any:
    """The parsed YAML document at `path`; raises `ConfigError` naming the line of a syntax error."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file.") from None
    except (IsADirectoryError, UnicodeDecodeError, PermissionError) as error:
        raise ConfigError(f"{path}: not a readable YAML file ({error}).") from None
    try:
        return yaml.load(text, Loader=_Loader)
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
        known = sorted(_field_names(kind, item["loc"][:-1]))
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        return f"{location}: unknown field" + (f", did you mean {near[0]!r}?" if near else _listed(known))
    if item["type"] == "missing":
        return f"{location}: required field is missing"
    given = item.get("input")
    shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool) else ""
    return f"{location}: {item['msg'].removeprefix('Value error, ')}{shown}"


def _listed(fields: list[str]) -> str:
    return f"; fields are {', '.join(fields)}" if 0 < len(fields) <= LISTED_FIELDS else ""


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


def _field_names(kind: Any, location: tuple[Any, ...]) -> set[str]:
    """Names of the fields that may stand at `location` (a validation error's path, union tags included)."""
    kinds = _configs(kind)
    for part in location:
        tagged = [one for one in kinds if "type" in one.model_fields and one.model_fields["type"].default == part]
        held = [one.model_fields[part].annotation for one in kinds if part in one.model_fields]
        if tagged:
            kinds = tagged
        elif held:
            kinds = [config for annotation in held for config in _configs(annotation)]
    return {name for config in kinds for name in config.model_fields}


def _configs(annotation: Any) -> list[type[BaseModel]]:
    """The config classes an annotation names itself: not those that are fields of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [config for argument in get_args(annotation) for config in _configs(argument)]
