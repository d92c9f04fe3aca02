"""``protea merge``: the shards of an output become one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def merge(
    outputs: Annotated[list[Path], typer.Argument(metavar="OUT...", help="Outputs as they were named with --shard.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace outputs that exist.")] = False,
) -> None:
    """Join the shards that `protea embed --shard i/N` wrote: the same records in the same order as from one process.

    The shards stay.

    \b
    Examples:
      protea merge big.h5
      protea merge vectors.parquet residues.h5
    """
    from protea.embed import merge as shards

    for output in outputs:
        totals = shards.merge(output, overwrite=overwrite)
        typer.echo(f"{output}: {totals.embedded:,} sequences, {totals.residues:,} residues")
