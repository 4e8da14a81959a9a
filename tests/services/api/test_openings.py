"""No field of a config through which a request could reach a file or code is overlooked."""

from collections.abc import Iterator
from typing import Any, get_args

from moestro.config import Config, LifecycleConfig, TaskConfig, validate
from moestro_services.gateway.openings import OPEN_FIELDS, openings

HARMLESS = {
    ("TaskConfig", "name"): "a key of reasoning-gym's table",
    ("TaskConfig", "arguments"): "words among them are openings",
    ("FileSource", "text_field"): "a column of a file that the operator named",
    ("TuneConfig", "frozen_experts"): "names of experts",
    ("Prompts", "positive"): "text that is read by the model",
    ("Prompts", "negative"): "text that is read by the model",
    ("DeployConfig", "sample_prompt"): "text that is read by the model",
    ("DeployConfig", "force"): "a reason that is written down",
}
"""Fields that hold any text, with why they reach nothing. A new one fails here until somebody has thought about it."""


def kinds(annotation: Any, seen: set[type[Config]]) -> Iterator[type[Config]]:
    """The config classes in an annotation, and in those of their fields."""
    if isinstance(annotation, type) and issubclass(annotation, Config) and annotation not in seen:
        seen.add(annotation)
        yield annotation
        for field in annotation.model_fields.values():
            yield from kinds(field.annotation, seen)
    for argument in get_args(annotation):
        yield from kinds(argument, seen)


def holds_any_text(schema: Any) -> bool:
    """Whether a string without a pattern or a list of choices may stand in a value of that JSON schema."""
    if isinstance(schema, list):
        return any(holds_any_text(item) for item in schema)
    if not isinstance(schema, dict):
        return False
    if schema.get("type") == "string" and not {"pattern", "enum", "const"} & set(schema):
        return True
    inner = (schema.get(key) for key in ("anyOf", "items", "prefixItems", "additionalProperties"))
    return any(holds_any_text(item) for item in inner)


def test_every_field_that_holds_any_text_was_thought_about() -> None:
    found = {
        (kind.__name__, name)
        for kind in kinds(LifecycleConfig, set())
        for name, schema in kind.model_json_schema()["properties"].items()
        if holds_any_text(schema)
    }
    assert {field for field in found if field[1] not in OPEN_FIELDS} == set(HARMLESS)


def test_what_is_named_anywhere_is_found() -> None:
    config = validate(
        LifecycleConfig,
        {
            "name": "all",
            "data": {
                "domains": [
                    {"name": "code", "source": {"type": "files", "paths": ["a", "b"]}},
                    {"name": "math", "source": {"type": "task", "tasks": [{"name": "x", "arguments": {"f": "g"}}]}},
                ]
            },
            "seed": {"type": "import", "path": "c"},
            "branch": {"existing": {"code": {"path": "d"}, "math": {"path": "e"}}},
            "rl": {"task": {"name": "y"}, "rewards": [{"type": "function", "path": "m:f"}]},
        },
        where="test",
    )
    assert {value for _, _, value in openings(config)} == {"a", "b", "c", "d", "e", "g", "m:f"}
    assert openings(TaskConfig(name="x", arguments={"size": 3})) == frozenset()
