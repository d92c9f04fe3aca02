"""``protea merge``: one output from its shards."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Final

import typer

from protea.cli import options
from protea.cli.interrupt import interruptible
from protea.cli.options import Overwrite
from protea.cli.terminal import bars, tell
from protea.errors import FinishedError, OutputError, UsageError
from protea.text import counted

_SUFFIXES: Final = ("", ".parquet", ".h5", ".hdf5", ".csv", ".npz", ".tsv", ".gz", ".bz2", ".zst")


@options.options_of()
def merge(
    outputs: Annotated[
        list[Path], typer.Argument(metavar="OUT...", help="Outputs, as the commands of their shards named them.")
    ],
    overwrite: Overwrite = False,
) -> None:
    """Join the shards of `protea embed --shard i/N`, or of `protea score` or `protea predict`, in order of the input.

    The shards stay. If rows of a table of variants could not be scored, the exit code is 1, as that of `protea score`.

    \b
    Examples:
      protea merge big.h5
      protea merge vectors.parquet residues.h5
      protea merge scored.csv
    """
    failed = False
    for output in outputs:
        with interruptible():
            failed |= _merge(output, overwrite=overwrite)
    if failed:
        raise typer.Exit(1)


def _merge(output: Path, *, overwrite: bool) -> bool:
    """Merge one output; returns whether rows of it could not be scored."""
    from protea.output import check_output
    from protea.shards import command_of, find_shards

    if output.suffix not in _SUFFIXES:
        known = ", ".join(_SUFFIXES[1:])
        raise UsageError(f"merge {output}: unknown suffix {output.suffix!r}; use {known}, or a name without suffix")
    try:
        shards = find_shards(output)
    except OutputError:
        if os.path.lexists(output):  # without its shards, what exists cannot be compared
            check_output(output, overwrite=overwrite)
        raise
    command = command_of(shards[0])
    if command == "score":
        from protea.cli.score import show_merged
        from protea.score.sharded_scores import merge_scores

        try:
            return show_merged(output, merge_scores(output, shards, overwrite=overwrite))
        except FinishedError as finished:  # others may follow
            tell(str(finished))
            return False
    with bars() as progress:
        if command == "predict":
            from protea.finetune.sharded_predictions import merge_predictions

            totals = merge_predictions(output, shards, overwrite=overwrite, progress=progress)
        else:
            from protea.embed.sharded import merge as merge_embeddings

            totals = merge_embeddings(output, shards, overwrite=overwrite, progress=progress)
    typer.echo(f"{output}: {counted(totals.embedded, 'sequence')}, {counted(totals.residues, 'residue')}")
    return False
