"""The Typer app and `main`, which turns errors into one readable line.

Exit codes: 0 done, 1 a check that was asked for failed, 2 a mistake that the user can mend, 130 interrupted.
Unexpected exceptions propagate with their traceback: they are ours. With --json they are a document as well.
"""

import json
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

import typer

from moestro.errors import MoestroError, told
from moestro_services.cli.bench import bench
from moestro_services.cli.changing import append, remove
from moestro_services.cli.clean import clean
from moestro_services.cli.config_schema import config_app
from moestro_services.cli.deploy import deploy
from moestro_services.cli.doctor import doctor
from moestro_services.cli.ensemble import ensemble
from moestro_services.cli.experts import experts
from moestro_services.cli.index import index_app
from moestro_services.cli.keys import keys_app
from moestro_services.cli.lint import lint
from moestro_services.cli.promote import promote
from moestro_services.cli.report import report
from moestro_services.cli.rollback import rollback
from moestro_services.cli.run import plan, run
from moestro_services.cli.serve import serve
from moestro_services.cli.show import show
from moestro_services.cli.stage import evaluate, stage
from moestro_services.cli.steering import steer
from moestro_services.cli.ui import ui

INTERRUPTED = 130
USER_ERROR = 2

COMMANDS: list[tuple[str, Callable[..., Any]]] = [
    ("run", run),
    ("plan", plan),
    ("stage", stage),
    ("append", append),
    ("remove", remove),
    ("steer", steer),
    ("eval", evaluate),
    ("ensemble", ensemble),
    ("lint", lint),
    ("show", show),
    ("experts", experts),
    ("report", report),
    ("deploy", deploy),
    ("promote", promote),
    ("rollback", rollback),
    ("serve", serve),
    ("ui", ui),
    ("bench", bench),
    ("doctor", doctor),
    ("clean", clean),
]
GROUPS: list[tuple[str, typer.Typer]] = [("keys", keys_app), ("index", index_app), ("config", config_app)]

app = typer.Typer(
    name="moestro",
    help="From one dense checkpoint and a few domain corpora to a served Mixture-of-Experts model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for _name, _function in COMMANDS:
    app.command(_name)(_function)
for _name, _group in GROUPS:
    app.add_typer(_group, name=_name)


def main() -> None:
    """Entry point of the `moestro` command."""
    try:
        sys.exit(app(standalone_mode=not _json_wanted()))
    except MoestroError as error:
        _tell(type(error).__name__, "\n".join([error.message, *getattr(error, "__notes__", ())]), error.hint)
        sys.exit(USER_ERROR)
    except typer.TyperException as error:  # with --json alone: otherwise Typer prints it
        _tell("UsageError", error.format_message(), "`moestro COMMAND --help` lists arguments and options.")
        sys.exit(USER_ERROR)
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            sys.stderr.write("interrupted\n")
        raise
    except BaseException:
        if _json_wanted():
            sys.excepthook = _tell_unexpected  # only now: Typer has put one of its own in place
        raise


def _tell_unexpected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The traceback on standard error, and on standard output what every other error is."""
    sys.__excepthook__(kind, error, trace)
    if isinstance(error, Exception):
        _tell(kind.__name__, told(error), "It is not foreseen: standard error has its traceback.")


def _json_wanted() -> bool:
    return "--json" in sys.argv[1:]


def _tell(kind: str, message: str, hint: str) -> None:
    """One line on standard error (the end of a log may follow), or with --json one document on standard output."""
    if _json_wanted():
        body = {"kind": kind, "message": message, "hint": hint}
        sys.stdout.write(json.dumps({"error": body}, ensure_ascii=False) + "\n")
    else:
        first, *details = message.splitlines() or [""]
        sys.stderr.write(f"error: {first} {hint}".rstrip() + "\n")
        sys.stderr.writelines(f"  {line}\n" for line in details)
