"""``protea info``: what a model is, and which there are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from protea import bundled
from protea.errors import UsageError


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
    if not list_all:
        _print_model(bundled.NAME if model is None else model, as_json)
    elif model is None:
        _print_list(as_json)
    else:
        raise UsageError("name a MODEL, or pass --list")


def _print_list(as_json: bool) -> None:
    from protea.checkpoints.summary import listing

    rows = listing()
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    header = {
        "name": "NAME",
        "family": "FAMILY",
        "parameters": "PARAMETERS",
        "format": "FORMAT",
        "contact_head": "CONTACTS",
        "licence": "LICENCE",
        "place": "WEIGHTS",
    }
    contacts = {True: "yes", False: "no"}
    lines = [
        header,
        *(
            {**row, "parameters": f"{row['parameters']:,}", "contact_head": contacts[row["contact_head"]]}
            for row in rows
        ),
    ]
    widths = {key: max(len(str(line[key])) for line in lines) for key in header}
    for line in lines:
        cells = [
            f"{line[key]:>{widths[key]}}" if key == "parameters" else f"{line[key]:<{widths[key]}}" for key in header
        ]
        typer.echo("  ".join(cells).rstrip())


def _print_model(model: str, as_json: bool) -> None:
    from protea.checkpoints.summary import describe

    description = describe(model)
    if as_json:
        typer.echo(json.dumps(description, indent=2))
        return
    for label, value in _lines(description):
        typer.echo(f"{label:<14}{value}")


def _lines(description: dict[str, Any]) -> Iterator[tuple[str, str]]:
    limit, trained = description["residue_limit"], description["trained_residues"]
    yield "model", description["model"]
    yield "family", description["family"]
    yield "size", "{layers} layers, width {width}, {heads} heads".format(**description)
    yield "parameters", f"{description['parameters']:,}"
    memory = (f"{name} {size / 1e9:.3g} GB" for name, size in description["memory_bytes"].items())
    yield "memory", ", ".join(memory)
    yield "alphabet", "{alphabet}, {tokens} tokens, residues {residues}".format(**description)
    yield "limit", f"none; the family was trained on {trained:,} residues" if limit is None else f"{limit:,} residues"
    yield "capabilities", ", ".join(["embed", *description["capabilities"]])
    if "licence" in description:
        yield "licence", description["licence"] or "no published weights"
    yield "weights", description["weights"] or "none"
    if description.get("published_sha256"):
        yield "sha256", f"{description['published_sha256']} (as published)"
    if "format" in description:
        yield "format", description["format"]
    if "sha256" not in description:
        yield "", "not on this machine"
        return
    yield "stored as", ", ".join(description["stored_as"])
    for name, digest in description["sha256"].items():
        yield "sha256", f"{digest}  {name}"
