"""``protea info``, ``init``, ``convert`` and ``check``: models and their files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from protea import bundled
from protea.cli.interrupt import interruptible
from protea.cli.options import AsJson, Dtype, computing, options_of
from protea.cli.terminal import bars, show_json, show_table
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


@options_of()
def info(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="A name, a folder, or a Hugging Face repository.", show_default=bundled.NAME
        ),
    ] = None,
    list_all: Annotated[bool, typer.Option("--list", help="Show every name Protea knows, with its licence.")] = False,
    as_json: AsJson = False,
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
    with bars("bytes") as progress:
        content = listing() if list_all else describe(bundled.NAME if model is None else model, progress)
    if as_json:
        show_json(content)
    elif isinstance(content, list):
        shown = ({**row, "parameters": f"{row['parameters']:,}"} for row in content)
        rows = [[{True: "yes", False: "no"}.get(row[key], str(row[key])) for key in _COLUMNS] for row in shown]
        show_table(list(_COLUMNS.values()), rows)
    else:
        for label, value in summarise(content):
            typer.echo(f"{label:<14}{value}")


@options_of()
def init(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A name from `protea info --list`.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Folder to write; must be new.")],
    seed: Annotated[int, typer.Option(help="The same seed gives the same weights, on any machine.")] = 0,
    dtype: Dtype = "float32",
) -> None:
    """Write a model of a published architecture with random weights, by its family's own initialisation.

    \b
    Examples:
      protea init esm2_t6_8M_UR50D -o model/ --seed 1
      protea init esm1nv -o nv/
    """
    from protea.checkpoints import hf
    from protea.checkpoints.hub import architecture, published
    from protea.device import resolve_dtype

    known = published(model)
    with interruptible(), bars() as progress:
        hf.write_random(output, architecture(known), seed=seed, dtype=resolve_dtype(dtype), progress=progress)
    typer.echo(f"{output}: {known.name} with random weights (seed {seed}); it knows nothing of proteins yet")


@options_of(computing)
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A checkpoint of any format, or a published name.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="File or folder to write; must be new.")],
    to: Annotated[
        str | None,
        typer.Option(metavar="FORMAT", help="hf, fair-esm, nemo, nemo2 or te; by default chosen by DST's ending."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="TYPE", help="float32, bfloat16 or float16; by default the source's own.")
    ] = None,
    peers: Annotated[
        bool, typer.Option("--peers/--no-peers", help="Compare with transformers or Meta's esm where installed.")
    ] = True,
) -> None:
    """Convert a checkpoint to another format, and prove that the copy is equal.

    The copy is read again. Every tensor must equal the source's bit for bit. Logits of fixed sequences are compared
    with the source's, and with those of the library that reads the format. Parameters that a format cannot hold, such
    as a contact head, are kept in extras.safetensors beside the copy, and read with it. The format of SRC is
    recognised by its content; nothing pickled in it is run.

    \b
    Formats:
      hf                 Hugging Face folder, Protea's own
      fair-esm           NAME.pt of Meta's esm package
      nemo               .nemo of BioNeMo 1
      nemo2              checkpoint directory of BioNeMo 2
      te                 folder of NVIDIA's TransformerEngine
      sequence-models    NAME.pt of Microsoft's sequence-models
      evolutionaryscale  NAME.pth of EvolutionaryScale's esm
    Which families a format has is in docs/checkpoints.md.

    \b
    Examples:
      protea convert esm2_t6_8M_UR50D.pt esm2_8M/
      protea convert esm1nv.nemo esm1nv/
      protea convert esm2_8M/ esm2_8M.nemo
      protea convert esm2_t33_650M_UR50D 650M-te/ --to te --dtype bfloat16
    """
    from protea.checkpoints.convert import convert as run
    from protea.device import resolve_dtype

    kind = None if dtype is None else resolve_dtype(dtype)
    with interruptible(), bars() as progress:
        report = run(source, target, to, dtype=kind, peers=peers, progress=progress)
    stored = str(report.dtype).removeprefix("torch.")
    typer.echo(f"read      {report.path}: {report.source}, {report.family}, {report.parameters:,} parameters")
    typer.echo(f"wrote     {target}: {report.target}, {stored}")
    typer.echo(f"checked   {report.tensors} tensors read back and compared bit for bit")
    for label, lines in (("checked", report.checks), ("apart", report.apart), ("note", report.notes)):
        for line in lines:
            typer.echo(f"{label:<10}{line}")


@options_of(computing)
def check(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A published name, or a checkpoint of any format.")
    ] = bundled.NAME,
    as_json: AsJson = False,
) -> None:
    """Compare what a checkpoint computes with the numbers that were published for it.

    A checkpoint is compared with the published model that it is named after, else with the one whose architecture it
    has. A checkpoint in one file is also recognised by its SHA-256, where its publisher states that.

    Exit code: 0 all agree, 1 some differ, 3 nothing is known to compare with.

    \b
    Examples:
      protea check
      protea check esm2_t6_8M_UR50D --json
      protea check converted/esm2_t6_8M_UR50D.nemo
    """
    from protea.checkpoints import summary

    with bars() as progress:
        findings = summary.check(model, progress)
    if as_json:
        show_json(findings.shown())
        raise typer.Exit(3 if findings.passed is None else 0 if findings.passed else 1)
    typer.echo(f"{findings.path}: {findings.title}, {findings.family}")
    if findings.recognised_as is not None:
        typer.echo(f"pass  the file's SHA-256 is the one published for {findings.recognised_as}")
    for published, difference in findings.differences:
        typer.echo(
            f"{'pass' if difference <= summary.TOLERANCE else 'fail'}  {published.what} of {published.model}, from "
            f"{published.source}: largest difference {difference:.1e}, allowed {summary.TOLERANCE:g}"
        )
    if findings.passed is None:
        which = findings.compared_with or "this architecture"
        typer.echo(f"nothing could be checked: no published numbers are known for {which}")
        raise typer.Exit(3)
    if not findings.passed:
        typer.echo(f"these are not {findings.compared_with}'s weights: another training, or a damaged copy")
        raise typer.Exit(1)
