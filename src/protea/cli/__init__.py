"""The command line: one module a command, each thin: parse, call, print."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from typing import Annotated, Any, Final, NoReturn

import typer
from typer.exceptions import TyperException

from protea.cli.interrupt import INTERRUPTED
from protea.cli.terminal import printable, tell
from protea.errors import ProteaError, ProteaWarning

COMMANDS: Final = {
    "embed": "embed",
    "info": "info",
    "init": "init",
    "merge": "merge",
    "perplexity": "perplexity",
    "score": "score",
    "contacts": "contacts",
    "fit-contacts": "fit_contacts",
    "convert": "convert",
    "check": "check",
    "data": "data",
    "evaluate": "evaluate",
    "pretrain": "pretrain",
    "export": "export",
    "average": "export",
}
"""Commands in the order of the help, each with the module that has a function or an application of its name."""


def application(named: str | None) -> typer.Typer:
    """The command line with the command that is called, or with all of them where none is, as for the help.

    A run imports its own command alone, which spares it the others' modules.
    """
    app = typer.Typer(
        name="protea",
        help="Protein language models of the ESM family.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 3 nothing to compare with (check), 130 interrupted.",
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(_options)
    for name in [named] if named in COMMANDS else COMMANDS:
        command = getattr(import_module(f"protea.cli.{COMMANDS[name]}"), name.replace("-", "_"))
        if isinstance(command, typer.Typer):
            app.add_typer(command)
        else:
            app.command(name)(command)
    return app


def _version(wanted: bool) -> None:
    if wanted:
        import protea

        typer.echo(f"protea {protea.__version__}")
        raise typer.Exit


def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


def main() -> NoReturn:
    """Run the command line; errors become one line on standard error and an exit code, never a traceback."""
    warnings.showwarning = _show_warning
    warnings.simplefilter("always", ProteaWarning)
    try:
        code = application(next(iter(sys.argv[1:]), None))(prog_name="protea", standalone_mode=False)
    except TyperException as error:
        command = getattr(getattr(error, "ctx", None), "command_path", "protea")
        _fail(f"{error.format_message().rstrip('.')}; `{command} --help` shows what there is", error.exit_code)
    except ProteaError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        # What no command foresaw: a full disk under standard output, a file that went while it was read.
        _drop_output_that_cannot_be_written()
        _fail(f"{error.filename or 'reading or writing failed'}: {error.strerror or error}", 1)
    if code == INTERRUPTED:
        typer.echo(
            "protea: interrupted; `protea embed`, `protea data` and `protea pretrain` go on when the same command is "
            "given again, without --overwrite; other commands begin anew",
            err=True,
        )
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"protea: error: {printable(message)}", err=True)
    sys.exit(code)


def _drop_output_that_cannot_be_written() -> None:
    """Python flushes standard output when it ends, and would report a failure there a second time."""
    try:
        sys.stdout.flush()
    except OSError:
        sys.stdout = None


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    tell(str(message))
