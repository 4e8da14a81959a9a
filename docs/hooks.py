"""Reference pages made from the code while the documentation is built, so that they cannot say anything else.

`reference/config.md` comes from the pydantic models, `reference/cli.md` from the Typer app, `reference/rest.md` from
the gateway's OpenAPI document, `reference/families.md` from the registries of families and recipes,
`reference/lint-rules.md` from that of the rules.
"""

import enum
import inspect
import re
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤", "multiple_of": "multiple of", "min_length": "length ≥"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {
        "reference/config.md": config_page,
        "reference/cli.md": cli_page,
        "reference/families.md": families_page,
        "reference/lint-rules.md": lint_rules_page,
        "reference/rest.md": rest_page,
    }
    for path, make in pages.items():
        files.append(File.generated(config, path, content=make()))
    return files


def config_page() -> str:
    """Every config class with its fields, their types, defaults and docstrings."""
    from moestro import config
    from moestro.config.base import Config

    classes = [item for name in config.__all__ if inspect.isclass(item := getattr(config, name)) and item is not Config]
    classes.sort(key=lambda kind: (kind is not config.LifecycleConfig, kind.__name__))
    lines = [
        "# Config",
        "",
        "A lifecycle is a YAML file of the form [LifecycleConfig](#lifecycleconfig). Unknown fields are refused.",
        "Fields marked *execution* say where or how it is run; all others are identity.",
    ]
    for kind in classes:
        lines += ["", f"## {kind.__name__}", "", inspect.getdoc(kind) or "", ""]
        lines += ["| Field | Type | Default | Meaning |", "|---|---|---|---|"]
        lines += [_field_row(name, field) for name, field in kind.model_fields.items()]
    return "\n".join(lines) + "\n"


def _field_row(name: str, field: FieldInfo) -> str:
    from moestro.config.base import EXECUTION

    bounds = [f"{BOUNDS[bound]} {value}" for bound, value in _metadata(field) if bound in BOUNDS]
    meaning = " ".join((field.description or "Which of the variants this is.").split())
    if EXECUTION in field.metadata:
        meaning += " *Execution.*"
    shown = ", ".join([_type(field.annotation), *bounds])
    return f"| `{name}` | {shown} | {_default(field)} | {_cell(meaning)} |"


def _metadata(field: FieldInfo) -> Iterator[tuple[str, Any]]:
    for item in field.metadata:
        for bound in BOUNDS:
            if hasattr(item, bound):
                yield bound, getattr(item, bound)


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required" if field.default_factory is None else "empty"
    if hasattr(field.default, "model_dump"):
        return "its defaults" if field.default == type(field.default)() else "other than its defaults"
    return f"`{'none' if field.default is None else _cell(str(field.default))}`"


def _type(annotation: Any) -> str:
    """An annotation as Markdown, config classes linked."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in {Union, types.UnionType}:
        return " or ".join(_type(item) for item in arguments)
    if origin is tuple:
        return "list of " + " or ".join(dict.fromkeys(_type(item) for item in arguments if item is not Ellipsis))
    if origin is dict:
        return f"mapping to {_type(arguments[1])}"
    return _plain_type(annotation)


def _plain_type(annotation: Any) -> str:
    if annotation is type(None):
        return "none"
    if hasattr(annotation, "model_fields"):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    return str(annotation.__name__)


def cli_page() -> str:
    """Every command with its arguments and options."""
    import typer.main

    from moestro_services.cli.app import app

    lines = ["# Command line", "", "Exit codes: 0 done, 1 a check that was asked for failed, 2 a mistake you can mend."]
    for path, command in _commands(typer.main.get_command(app), ("moestro",)):
        lines += ["", f"## {' '.join(path)}", "", command.help or "", ""]
        if command.params:
            lines += ["| Argument or option | Default | Meaning |", "|---|---|---|"]
            lines += [_parameter_row(parameter) for parameter in command.params]
    return "\n".join(lines) + "\n"


def _commands(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name, child in command.commands.items():
        yield from _commands(child, (*path, name))


def _parameter_row(parameter: Any) -> str:
    names = [*parameter.opts, *parameter.secondary_opts]
    shown = " ".join(f"`{name if name.startswith('-') else name.upper()}`" for name in names)
    default = parameter.default
    if isinstance(default, enum.Enum):
        default = default.value
    given = "required" if parameter.required else "" if default in (None, "", ()) else f"`{_cell(str(default))}`"
    return f"| {shown} | {given} | {_cell(parameter.help or '')} |"


FAMILIES_INTRODUCTION = """# Families

What a dense seed can become, by the `model_type` in its config.json. With `target: auto` the first row of an
architecture that carries the seed and all that [MixConfig](config.md#mixconfig) asks for is taken. Embeddings, norms,
attention, rotary embedding and its scaling, dtype, tokenizer, chat template and generation config are carried by all.
A seed with something that its row cannot carry is refused: the error names the field and the way out.

A shared expert is `gated`, its output multiplied by a sigmoid of its own, or `added` as it is. `glm4_moe` scores
experts by sigmoids also where `selection` is `softmax`, and without a generalist that is shared it holds a shared
expert of zeros: its classes know no other way."""


def families_page() -> str:
    """Which seed becomes which Mixture-of-Experts, by which recipe, and what serves it."""
    from moestro.mixing.recipes import RECIPES
    from moestro.models.families import UNSUPPORTED
    from moestro.models.families.support import CANNOT, support

    rows = list(support())
    lines = [FAMILIES_INTRODUCTION, "", f"None carries: {'; '.join(CANNOT)}.", ""]
    lines += [
        "| Seed | Becomes | Shared expert | Loss-free, groups | Keeps | Cannot carry |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row.shared_expert, "yes" if row.loss_free else "no", "; ".join(row.keeps), "; ".join(row.cannot)]
        lines.append(f"| `{row.dense}` | `{row.moe}` | {' | '.join(map(_cell, cells))} |")
    lines += [
        "",
        "## Recipes and engines",
        "",
        "Every recipe makes every kind; the cells say what serves the result.",
        "",
    ]
    lines += [
        f"| Seed | Becomes | {' | '.join(f'`{name}`' for name in RECIPES)} |",
        "|---|---|" + "---|" * len(RECIPES),
    ]
    lines += [f"| `{row.dense}` | `{row.moe}` | {' | '.join([row.engine] * len(RECIPES))} |" for row in rows]
    lines += ["", "## Not supported", "", "| Architecture | Why |", "|---|---|"]
    lines += [f"| `{name}` | {_cell(reason)} |" for name, reason in UNSUPPORTED.items()]
    return "\n".join(lines) + "\n"


def lint_rules_page() -> str:
    """Every rule of the linter."""
    from moestro.linting import RULES

    lines = [
        "# Lint rules",
        "",
        "What `moestro lint` finds ([Checking a checkpoint](../guides/lint.md)), in the order in which it looks. Rules",
        "marked * read only config and headers: `mix` applies them to what it makes.",
        "",
        "| Rule | Severity | Finds | `--fix` writes instead |",
        "|---|---|---|---|",
    ]
    for rule in RULES.values():
        mark = "" if rule.costly else "\\*"
        lines.append(f"| `{rule.name}`{mark} | {rule.severity} | {_cell(rule.about)} | {_cell(rule.mends)} |")
    return "\n".join(lines) + "\n"


def rest_page() -> str:
    """Every path of the gateway."""
    from moestro_flows.home import Home
    from moestro_services.gateway.assembly import Policy, assembled
    from moestro_services.gateway.fleet import Fleet
    from moestro_services.gateway.sources import Registered

    with tempfile.TemporaryDirectory() as folder:
        home = Home(Path(folder))
        source = Registered(home, tuple)
        with assembled(home, Fleet(source.open), Policy(keys=None), source.steering) as assembly:
            document = assembly.described()
    lines = [
        "# REST",
        "",
        "The gateway speaks OpenAI's API under `/v1`; requests and answers, streams included, are vLLM's own.",
        "Every request but `/health` and `/ready` bears `Authorization: Bearer KEY`, except under `--no-auth`.",
        "Mistakes are answered with a 4xx and a body that says what to do. `/openapi.json` describes everything.",
        "",
        "| Method | Path | Answers |",
        "|---|---|---|",
    ]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            text = operation.get("description") or operation.get("summary", "")
            lines.append(f"| {method.upper()} | `{path}` | {_cell(' '.join(text.split()))} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", text)
