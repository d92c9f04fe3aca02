"""Pages of all commands, from what ``--help`` shows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from inspect import cleandoc
from textwrap import dedent
from typing import Any

import typer.main

from protea import cli


def escaped(text: str) -> str:
    """Text of the help as Markdown that shows it as it is; options become code, and code stays code."""
    parts = re.sub(r"(?<![\w`-])--[a-z][a-z-]*(?=[^`]*(?:`[^`]*`[^`]*)*$)", r"`\g<0>`", text).split("`")
    parts[::2] = ["".join(f"\\{c}" if c in "\\*_<>[]#$~|" else c for c in part) for part in parts[::2]]
    return "`".join(parts)


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of a help text; those whose lines it keeps as they are become code."""
    for block in cleandoc(text).split("\n\n"):
        if not block.startswith("\b"):
            yield escaped(" ".join(block.split()))
            continue
        title, *lines = block.removeprefix("\b").strip("\n").splitlines()
        yield escaped(title)
        lines = dedent("\n".join(lines)).splitlines()
        commands = all(line.startswith("protea ") for line in lines)
        yield "\n".join(
            ["```console" if commands else "```text", *(f"{'$ ' * commands}{line}" for line in lines), "```"]
        )


def described(command: Any, name: str, level: int) -> Iterator[str]:
    """Blocks of Markdown for a command and the commands below it."""
    context = command.context_class(command, info_name=name)
    yield f"{'#' * level} {name}"
    yield f"```text\n{name} {' '.join(command.collect_usage_pieces(context))}\n```"
    yield from paragraphs(command.help or "")
    records = [
        (record[0], record[1], parameter.param_type_name)
        for parameter in command.get_params(context)
        if (record := parameter.get_help_record(context)) and "--help" not in parameter.opts
    ]
    if arguments := [(names, text) for names, text, kind in records if kind == "argument"]:
        yield "\n".join(f"- `{names}`: {escaped(text)}" for names, text in arguments)
    yield f"```{{program}} {name}\n```"
    for names, text, kind in records:
        if kind == "option":
            yield f"```{{option}} {names.replace(' / ', ', ')}\n{escaped(text)}\n```"
    yield from paragraphs(command.epilog or "")
    for below, subcommand in getattr(command, "commands", {}).items():
        yield from described(subcommand, f"{name} {below}", level + 1)


OPENING = """# Commands

These pages are made from the text of `protea COMMAND --help`.

| command | does |
|---|---|
"""


def command_pages() -> dict[str, str]:
    """The text of each page by its name."""
    application: Any = typer.main.get_command(cli.application(None))
    pages, rows = {}, []
    for name, command in application.commands.items():
        pages[f"reference/commands/{name}"] = "\n\n".join(described(command, f"protea {name}", 1)) + "\n"
        rows.append(f"| [`protea {name}`](commands/{name}.md) | {next(paragraphs(command.help))} |\n")
    return pages | {"reference/commands": f"{OPENING}{''.join(rows)}\n{escaped(application.epilog)}\n"}
