"""``protea embed`` and ``protea merge``: sequences in, embeddings out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from protea import bundled
from protea.cli.interrupt import interruptible
from protea.cli.options import FASTA, Device, Dtype, Fast, Model, Overwrite, TokenBudget, Unknown, load_to_compute
from protea.cli.terminal import bars, tell
from protea.text import counted

if TYPE_CHECKING:
    from protea.embed.settings import EmbedSettings

_REPORTED = ("truncated", "windowed", "altered", "renamed", "skipped")
"""Counts of records that the report lists."""


def embed(
    ctx: typer.Context,
    inputs: Annotated[list[str] | None, FASTA] = None,
    sequences: Annotated[
        Path | None,
        typer.Option("-o", "--sequences", metavar="OUT", help="One vector per sequence: .parquet, .h5, or a folder."),
    ] = None,
    residues: Annotated[
        Path | None,
        typer.Option("-r", "--residues", metavar="OUT", help="One vector per residue: .h5, .parquet, or a folder."),
    ] = None,
    model: Model = bundled.NAME,
    pool: Annotated[
        str, typer.Option(metavar="NAMES", help="Poolings for -o, by comma: mean, max, std (over residues), bos.")
    ] = "mean",
    layers: Annotated[
        str, typer.Option(metavar="NUMBERS", help="Layers, by comma: 0 is the embedding, -1 the last layer.")
    ] = "-1",
    dtype: Dtype = "float32",
    fast: Fast = False,
    store: Annotated[str, typer.Option(metavar="TYPE", help="Type to write: float32 or float16.")] = "float32",
    compression: Annotated[
        int | None, typer.Option(metavar="LEVEL", help="gzip level of HDF5 datasets, 1 to 9; none by default.")
    ] = None,
    device: Device = "auto",
    devices: Annotated[int, typer.Option(metavar="N", help="Number of GPUs that share the work.")] = 1,
    long: Annotated[
        str,
        typer.Option(
            metavar="POLICY",
            help="What to do with a sequence over 1,022 residues (510 for ESM-1nv): truncate, window, full, error.",
        ),
    ] = "truncate",
    unknown: Unknown = "x",
    duplicates: Annotated[
        str, typer.Option(metavar="POLICY", help="What to do with a repeated id: error, rename, skip.")
    ] = "error",
    token_budget: TokenBudget = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="i/N", help="Compute share i of N equal shares, into OUT.shard-i-of-N; join them with protea merge."
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="RUN.yaml", help="Read options from a file, such as OUT.run.yaml; flags override it."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace existing outputs and drop unfinished ones.")
    ] = False,
) -> None:
    """Embed protein sequences: one vector per sequence (-o), one per residue (-r), or both in one pass.

    After an interruption the same command continues. OUT.report.tsv lists every record that was truncated, altered,
    renamed or skipped.

    \b
    Examples:
      protea embed proteins.fasta -m esm2_t6_8M_UR50D -o proteins.parquet
      protea embed a.fasta.gz b.fasta -m my-model/ -r residues.h5 --layers 0,3,-1 --fast
      zcat big.fasta.gz | protea embed - -m my-model/ -o big.h5 --pool mean,max
      protea embed big.fasta -m my-model/ -o big.h5 --shard $SLURM_ARRAY_TASK_ID/16
      protea embed --config proteins.parquet.run.yaml -o again.parquet
    """
    from protea.embed.settings import parse, read_config

    values: dict[str, Any] = {} if config is None else read_config(config)
    values |= _given(ctx)
    settings = parse(values, "protea embed" if config is None else f"--config {config}")
    with interruptible():
        if settings.devices > 1:
            _embed_on_devices(settings, overwrite=overwrite)
        else:
            _embed(settings, overwrite=overwrite)


def merge(
    outputs: Annotated[list[Path], typer.Argument(metavar="OUT...", help="Outputs, named as for --shard.")],
    overwrite: Overwrite = False,
) -> None:
    """Join the shards that `protea embed --shard i/N` wrote, in the order of the input.

    The shards stay.

    \b
    Examples:
      protea merge big.h5
      protea merge vectors.parquet residues.h5
    """
    from protea.embed.shards import merge as merge_shards

    for output in outputs:
        totals = merge_shards(output, overwrite=overwrite)
        typer.echo(f"{output}: {totals.embedded:,} sequences, {totals.residues:,} residues")


def _given(ctx: typer.Context) -> dict[str, Any]:
    """The options on the command line, without defaults."""
    source = ctx.get_parameter_source
    options = {name: value for name, value in ctx.params.items() if name not in ("config", "overwrite")}
    return {name: value for name, value in options.items() if getattr(source(name), "name", "") == "COMMANDLINE"}


def _embed_on_devices(settings: EmbedSettings, *, overwrite: bool) -> None:
    from protea.embed.shards import run_on_devices

    with bars("residues") as progress:
        totals = run_on_devices(settings, progress, overwrite=overwrite)
    for output in settings.outputs:
        typer.echo(f"{output}: {totals.embedded:,} sequences, {totals.residues:,} residues")


def _embed(settings: EmbedSettings, *, overwrite: bool) -> None:
    from protea.device import native_bfloat16
    from protea.embed.run import EmbedRun

    start = time.perf_counter()
    loaded = load_to_compute(settings.model, device=settings.device, dtype=settings.dtype, fast=settings.fast)
    model = loaded.module
    with bars("residues") as progress:
        run = EmbedRun(settings, model, loaded.weights_sha256(), overwrite=overwrite, progress=progress)
        totals = run()
    for output in run.outputs:
        typer.echo(
            f"{output.path}: {totals.embedded:,} sequences, {totals.residues:,} residues, "
            f"{output.layout.width} values each ({', '.join(output.layout.kinds)})"
        )
    reported = [f"{count:,} {what}" for what in _REPORTED if (count := getattr(totals, what))]
    if reported:
        tell(f"{', '.join(reported)}: see {run.outputs[0].path}.report.tsv")
    computed = str(model.compute_dtype).removeprefix("torch.")
    seconds = time.perf_counter() - start
    typer.echo(f"{counted(totals.residues, 'residue')} in {seconds:.1f} s, {computed}, {model.device}", err=True)
    if model.compute_dtype.itemsize == 4 and native_bfloat16(model.device):
        measured = " (1.3 to 2 times on the CPU it was measured on)" if model.device.type == "cpu" else ""
        tell(
            f"this hardware computes bfloat16 natively: --fast is faster{measured}; its embeddings have a cosine of at "
            "least 0.999 to these"
        )
