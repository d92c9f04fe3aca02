"""``protea info``: what a model is, and which models there are."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from protea import bundled
from protea.cli.terminal import show_table
from protea.errors import UsageError

_COLUMNS = {
    "name": "NAME",
    "family": "FAMILY",
    "parameters": "PARAMETERS",
    "format": "FORMAT",
    "contact_head": "CONTACTS",
    "licence": "LICENCE",
    "place": "WEIGHTS",
}


def info(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="A name, a folder, or a Hugging Face repository.", show_default=bundled.NAME
        ),
    ] = None,
    list_all: Annotated[bool, typer.Option("--list", help="Show every name Protea knows, with its licence.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a model's size, memory, alphabet, limits, capabilities and checksum. Downloads nothing.

    \b
    Examples:
      protea info
      protea info esm2_t33_650M_UR50D
      protea info my-model/ --json
      protea info --list
    """
    from protea.checkpoints.summary import describe, listing, summarise

    if list_all and model is not None:
        raise UsageError("name a MODEL, or pass --list")
    content = listing() if list_all else describe(bundled.NAME if model is None else model)
    if as_json:
        typer.echo(json.dumps(content, indent=2))
    elif isinstance(content, list):
        shown = ({**row, "parameters": f"{row['parameters']:,}"} for row in content)
        rows = [[{True: "yes", False: "no"}.get(row[key], str(row[key])) for key in _COLUMNS] for row in shown]
        show_table(list(_COLUMNS.values()), rows)
    else:
        for label, value in summarise(content):
            typer.echo(f"{label:<14}{value}")
