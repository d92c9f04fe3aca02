"""``protea convert``: a checkpoint in another format, proved."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from protea.cli.interrupt import interruptible
from protea.cli.terminal import bars


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

    What was written is read again: every tensor is compared with the source's bit for bit, logits of fixed sequences
    with the source's and with those of the library that reads the format. What a format cannot hold, for example a
    contact head, is kept in extras.safetensors beside it, and comes back with it. The format of SRC is recognised by
    its content; nothing pickled in it is run.

    \b
    Formats:
      hf        Hugging Face folder, Protea's own       esm2, esm1b, esm1v, esm1nv
      fair-esm  NAME.pt of Meta's esm package           esm2, esm1b, esm1v
      nemo      .nemo of BioNeMo 1                      esm2, esm1nv
      nemo2     checkpoint directory of BioNeMo 2       esm2
      te        folder of NVIDIA's TransformerEngine    esm2

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
