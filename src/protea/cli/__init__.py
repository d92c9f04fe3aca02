"""The command line: one thin module per command, which only parses, calls and prints."""

from __future__ import annotations

import os
import sys
import warnings
from importlib import import_module
from typing import Annotated, Final, NoReturn

import typer
from typer.exceptions import TyperException

from protea.cli.interrupt import INTERRUPTED
from protea.cli.options import Commands
from protea.cli.terminal import tell
from protea.errors import ArgumentError, FinishedError, ProteaError, ProteaWarning, UsageError
from protea.text import printable

COMMANDS: Final = {
    "embed": "embed",
    "info": "model_files",
    "init": "model_files",
    "merge": "merge",
    "finetune": "finetune",
    "predict": "finetune",
    "perplexity": "perplexity",
    "score": "score",
    "contacts": "contacts",
    "fit-contacts": "contacts",
    "convert": "model_files",
    "check": "model_files",
    "data": "data",
    "evaluate": "evaluate",
    "compare": "compare",
    "pretrain": "pretrain",
    "plan": "plan",
    "export": "pretrain",
    "average": "pretrain",
    "serve": "serve",
    "doctor": "doctor",
}
"""Commands in the order of the help, each with its module in ``protea.cli``."""


def application(named: str | None, *, outline: bool = False) -> typer.Typer:
    """The command line with only the command ``named``, so that it starts fast; an unknown name gives all commands.

    An ``outline`` of them, for the help that lists them, has no options, and cannot run.
    """
    app = typer.Typer(
        name="protea",
        cls=Commands,
        help="Protein language models of the ESM family.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 3 nothing to compare with (check), 130 interrupted.",
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(_options)
    for name in [named] if named in COMMANDS else COMMANDS:
        command = getattr(import_module(f"protea.cli.{COMMANDS[name]}"), name.replace("-", "_"))
        if outline:
            text = command.info.help if isinstance(command, typer.Typer) else command.__doc__
            app.command(name, help=text)(_not_first)
        elif isinstance(command, typer.Typer):
            app.add_typer(command)
        else:
            app.command(name)(command)
    return app


def _not_first() -> None:
    raise UsageError("write the name of the command first, as in `protea embed`")


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
    """Run the command line. An error becomes one line on standard error and an exit code, never a traceback."""
    warnings.showwarning = lambda message, *_, **__: tell(str(message))
    warnings.simplefilter("always", ProteaWarning)
    try:
        word = _first_word()
        code = application(word, outline=word not in COMMANDS)(prog_name="protea", standalone_mode=False)
    except TyperException as error:
        command = getattr(getattr(error, "ctx", None), "command_path", "protea")
        _fail(f"{error.format_message().rstrip('.')}; see `{command} --help`", error.exit_code)
    except FinishedError as finished:
        tell(str(finished))
        code = finished.exit_code
    except ProteaError as error:
        _fail(_as_typed(error), error.exit_code)
    except OSError as error:
        # Commands report the files they know of. What remains is standard output on a full disk, or a vanished file.
        _drop_unwritten_output()
        _fail(f"{error.filename or 'reading or writing failed'}: {error.strerror or error}", 1)
    if code == INTERRUPTED and os.environ.get("RANK", "0") == "0":
        typer.echo(
            "protea: interrupted; embed, data, pretrain, finetune, predict, evaluate flip and compare continue when "
            "you run the same command again without --overwrite; other commands start again",
            err=True,
        )
    sys.exit(code if isinstance(code, int) else 0)


def _first_word() -> str | None:
    """The first word of the command line: of this process, or of the one that a shell asks to complete."""
    typed = os.environ.get("COMP_WORDS", os.environ.get("_TYPER_COMPLETE_ARGS", ""))  # bash; zsh and fish
    words = typed.split()[1:] if "_PROTEA_COMPLETE" in os.environ else sys.argv[1:]
    return next((word for word in words if word != "--"), None)


def _as_typed(error: ProteaError) -> str:
    """The message, with an option instead of the argument of Python that it begins with."""
    name, _, rest = str(error).partition("=")
    return f"--{name.replace('_', '-')} {rest}" if isinstance(error, ArgumentError) else str(error)


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"protea: error: {printable(message)}", err=True)
    sys.exit(code)


def _drop_unwritten_output() -> None:
    """Stop Python from reporting again, at its exit, that standard output cannot be written."""
    try:
        sys.stdout.flush()
    except OSError:
        sys.stdout = None
